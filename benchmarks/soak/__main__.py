"""`python -m benchmarks.soak`."""

from benchmarks.soak.command import main

main()
