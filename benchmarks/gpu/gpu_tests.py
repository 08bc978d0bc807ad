"""The tests that need a GPU, with the outcome of each.

    python -m benchmarks.gpu.gpu_tests

Only files that hold such tests are collected, so packages that other tests need may be missing. If it is asked to stop
(SIGTERM), the tests that have ended are reported. The last line of the output is the result as JSON.
"""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import ROOT, parser, result_name, settings, write_result
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row

NEEDS_GPU = re.compile(r"^@pytest\.mark\.gpu\b|^pytestmark = pytest\.mark\.gpu\b", re.MULTILINE)
TAIL = 2000
"""Last characters of an error that are kept."""


class Outcomes:
    """A plugin of pytest that keeps how each test ended."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of one phase (set-up, call, tear-down) of a test; called by pytest."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed":
            test |= {"outcome": report.outcome, "error": report.longreprtext[-TAIL:]}


def files_with_gpu_tests(folder: Path) -> list[Path]:
    """The test files below a folder that hold tests marked `gpu`."""
    return [path for path in sorted(folder.rglob("test_*.py")) if NEEDS_GPU.search(path.read_text())]


def rows(result: Result) -> list[Row]:
    """How many tests passed."""
    counts = result["counts"]
    wanted = f"{sum(counts.values())} tests"
    return [Row("tests that need a GPU", ", ".join(f"{n} {name}" for name, n in counts.items()), wanted, None)]


def charts(result: Result) -> list[Chart]:
    """Seconds of each test."""
    bars = [(name.rpartition("::")[2][:40], test["seconds"]) for name, test in result["tests"].items()]
    return [Chart("seconds of each test", bars)] if bars else []


PRESENTATION = Presentation(rows, charts)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt  # pytest ends in good order


def main() -> None:
    """Run the tests that the command line names, and write their outcomes."""
    options = parser(__doc__, name="gpu_tests")
    options.add_argument("--marker", default="gpu", help="expression of pytest's -m")
    options.add_argument("--files", type=Path, nargs="+", help="default: all that hold tests marked gpu")
    args = options.parse_args()
    files = args.files or files_with_gpu_tests(ROOT / "tests")
    signal.signal(signal.SIGTERM, _stop)
    outcomes = Outcomes()
    status = pytest.main(["-m", args.marker, "-v", "-p", "no:cacheprovider", *map(str, files)], plugins=[outcomes])
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for test in outcomes.tests.values():
        counts[test["outcome"]] += 1
    record = {"settings": settings(args), "exit_status": int(status), "counts": counts, "tests": outcomes.tests}
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
