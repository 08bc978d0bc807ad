"""`python -m handsoff_stream.cli` is the command `handsoff-stream`."""

from handsoff_stream.cli import main

main()
