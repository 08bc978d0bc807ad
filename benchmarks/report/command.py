"""Write the tables and plots of the committed results, or check that they are up to date.

    python -m benchmarks.report            # writes README.md between its markers, results/README.md and the plots
    python -m benchmarks.report --check    # writes nothing; fails if a file is out of date

The last line of the output is JSON: the files that were written or are out of date, and the result files of kinds that
are not reported.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS, ROOT
from benchmarks.report.kinds import KINDS
from benchmarks.report.tables import generated_files, kind, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, by default those of the command line; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options.add_argument("--results", type=Path, default=RESULTS, help="a folder below the README's")
    args = options.parse_args(arguments)
    stale = {
        path: content
        for path, content in generated_files(args.readme, args.results, load(args.results)).items()
        if not path.exists() or path.read_text() != content
    }
    names = [path.relative_to(args.readme.parent).as_posix() for path in stale]
    left_out = sorted(path.name for path in args.results.glob("*.json") if kind(path) not in KINDS)
    if args.check:
        if stale:
            print(f"out of date: {', '.join(names)}; run `python -m benchmarks.report`", file=sys.stderr)
        print(json.dumps({"stale": names, "left_out": left_out}))
        return int(bool(stale))
    for path, content in stale.items():
        path.write_text(content)
    print(json.dumps({"written": names, "left_out": left_out}))
    return 0
