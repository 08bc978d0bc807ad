"""`python -m benchmarks.downstream`; see `benchmarks.downstream.comparison`."""

from benchmarks.downstream.comparison import main

if __name__ == "__main__":  # workers import this module
    main()
