"""python -m handsoff_stream.cli"""

from handsoff_stream.cli import main

main()
