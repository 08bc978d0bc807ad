"""The committed results => the tables in README.md and results/README.md, and a plot beside each result.

    python benchmarks/report.py            # rewrites the part of README.md between the markers, and files of results/
    python benchmarks/report.py --check    # writes nothing; fails if either is out of date

Everything shown comes from `benchmarks/results/*.json`: the numbers, the hardware, the date. What is said of a kind of
result, and how, is in `report_rows.py` and `report_offline_rows.py`. Does not measure. Last line of stdout: JSON, with
the files that are stale or were written, and the results of which nothing is said.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bar_chart import svg
from common import RESULTS, ROOT
from report_offline_rows import OFFLINE
from report_rows import STREAM, Row

KINDS = STREAM | OFFLINE

BEGIN = "<!-- measured: written by benchmarks/report.py -->"
END = "<!-- end of measured -->"
HEADER = "Written by `python benchmarks/report.py` from the files in this folder."


def load(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every result file of a known kind, by path, in the order of `KINDS`, small geometries first (shorter names)."""
    known = [path for path in sorted(folder.glob("*.json")) if kind(path) in KINDS]
    order = list(KINDS)
    return {
        path: json.loads(path.read_text())
        for path in sorted(known, key=lambda p: (order.index(kind(p)), len(p.stem), p.stem))
    }


def kind(path: Path) -> str:
    """What a result file is about: its name up to the first "-"."""
    return path.stem.split("-")[0]


def rows_of(path: Path, result: dict[str, Any]) -> list[Row]:
    """The rows of one result.

    Raises:
        ValueError: the file lacks what this version shows; it was written by an older one.
    """
    try:
        return KINDS[kind(path)].rows(result)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} lacks {error}, which a result of this kind has; measure again with the command in "
            "benchmarks/README.md, or remove the file"
        ) from error


def hardware(machine: dict[str, Any]) -> str:
    """Where and when, in a few words."""
    cores = machine["cpu_cores"]
    where = machine["gpu"] or f"{cores} core{'s' if cores > 1 else ''} of {machine['cpu']}"
    return f"{where}, {machine['date'][:10]}"


def markdown(results: dict[Path, dict[str, Any]], root: Path, all_rows: Path | None = None) -> str:
    """The table and what must be said with it; links start at `root`.

    `all_rows`: the file that shows every row, where this table has the headlines; None: it shows every row itself.
    """
    lines = ["| | handsoff_stream | compared with | ratio | on |", "|---|---|---|---|---|"]
    for path, result in results.items():
        place = f"[{hardware(result['machine'])}]({path.relative_to(root).as_posix()})"
        for row in rows_of(path, result):
            if all_rows is not None and not row.headline:
                continue
            ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
            lines.append(f"| {row.what} | {row.ours} | {row.other} | {ratio} | {place} |")
    notes = [
        "The two numbers of a row come from one run on one machine, unless the row names whose the second is. Each row",
        "links to its result file, which holds command, settings and versions; its plot lies beside it.",
    ]
    if all_rows is not None:
        notes.append(f"[All rows]({all_rows.relative_to(root).as_posix()}).")
    if not any(result["machine"]["gpu"] for result in results.values()):
        notes.append(
            "**None of this has run on a GPU yet**; `benchmarks/README.md` has the commands that will measure it."
        )
    return "\n".join([*lines, "", *notes])


def between_markers(text: str, content: str) -> str:
    """`text` with everything between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the README must hold each of the lines {BEGIN!r} and {END!r} once, in this order; add them")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def wanted(readme: Path, folder: Path, results: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """What each generated file should hold."""
    all_rows = folder / "README.md"
    table = markdown(results, readme.parent, all_rows)
    files = {
        readme: between_markers(readme.read_text(), table),
        all_rows: f"# Results\n\n{HEADER}\n\n{markdown(results, folder)}\n",
    }
    for path, result in results.items():
        if charts := KINDS[kind(path)].charts(result):
            files[path.with_suffix(".svg")] = svg(charts)
    return files


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options.add_argument("--results", type=Path, default=RESULTS, help="a folder below the README's")
    args = options.parse_args()
    stale = {
        path: content
        for path, content in wanted(args.readme, args.results, load(args.results)).items()
        if not path.exists() or path.read_text() != content
    }
    names = [path.relative_to(args.readme.parent).as_posix() for path in stale]
    left_out = sorted(path.name for path in args.results.glob("*.json") if kind(path) not in KINDS)
    if args.check:
        if stale:
            print(f"out of date: {', '.join(names)}; run `python benchmarks/report.py`", file=sys.stderr)
        print(json.dumps({"stale": names, "left_out": left_out}))
        return int(bool(stale))
    for path, content in stale.items():
        path.write_text(content)
    print(json.dumps({"written": names, "left_out": left_out}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
