"""Copy the results of parts to benchmarks/results/, each to a file of its own; `python -m benchmarks.report` is next.

python -m benchmarks.gpu.collect gpu-results/part1.json gpu-results/part2.json
"""

import argparse
from pathlib import Path

from benchmarks.common import RESULTS, short_path
from benchmarks.gpu.record import copy_results


def main() -> None:
    """Copy the results of the parts that the command line names to the committed ones, and print where they are."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", type=Path, nargs="+")
    for part in options.parse_args().parts:
        for path in copy_results(part, RESULTS):
            print(short_path(str(path)))


if __name__ == "__main__":
    main()
