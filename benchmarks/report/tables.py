"""Result files => the text of README.md between its markers, of results/README.md, and of each plot.

Every number, the hardware and the date come from the result files. Knows files and Markdown. Does not measure.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.report.bar_chart import svg
from benchmarks.report.kinds import KINDS
from benchmarks.report.rows import Result, Row

BEGIN = "<!-- measured: written by python -m benchmarks.report -->"
END = "<!-- end of measured -->"
HEADER = "Written by `python -m benchmarks.report` from the files in this folder."


def kind(path: Path) -> str:
    """What a result file is about: its name up to the first "-"."""
    return path.stem.split("-")[0]


def load(folder: Path) -> dict[Path, Result]:
    """Every result of a known kind by path, in the order of `KINDS`; within a kind, shorter file names come first."""
    known = [path for path in sorted(folder.glob("*.json")) if kind(path) in KINDS]
    order = list(KINDS)
    return {
        path: json.loads(path.read_text())
        for path in sorted(known, key=lambda p: (order.index(kind(p)), len(p.stem), p.stem))
    }


def rows_of(path: Path, result: Result) -> list[Row]:
    """The rows of one result.

    Raises:
        ValueError: the file lacks an entry that is shown, because an older version wrote it.
    """
    try:
        return KINDS[kind(path)].rows(result)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} lacks {error}, which a result of this kind has, so it cannot be shown; measure again with "
            "the command in benchmarks/README.md, or remove the file"
        ) from error


def hardware(machine: dict[str, Any]) -> str:
    """Processor and date of a measurement, in a few words."""
    cores = machine["cpu_cores"]
    where = machine["gpu"] or f"{cores} core{'s' if cores > 1 else ''} of {machine['cpu']}"
    return f"{where}, {machine['date'][:10]}"


def markdown(results: dict[Path, Result], root: Path, all_rows: Path | None = None) -> str:
    """The table and the notes below it.

    Args:
        results: by path.
        root: the folder that links start from.
        all_rows: the file with every row, if this table has the headlines only; None: this table has every row.
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
        "The two numbers of a row come from one run on one machine, unless the row says whose the second one is. Each",
        "row links to its result file, which holds command, settings and versions; its plot is in the same folder.",
    ]
    if all_rows is not None:
        notes.append(f"[All rows]({all_rows.relative_to(root).as_posix()}).")
    if not any(result["machine"]["gpu"] for result in results.values()):
        notes.append(
            "**None of this has run on a GPU yet**; `benchmarks/README.md` has the commands that will measure it."
        )
    return "\n".join([*lines, "", *notes])


def between_markers(text: str, content: str) -> str:
    """`text` with everything between the markers replaced by `content`.

    Raises:
        ValueError: `text` does not hold both markers once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(
            f"README.md does not hold each of the lines {BEGIN!r} and {END!r} once and in this order, so the table "
            "has no place; add them"
        )
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def generated_files(readme: Path, folder: Path, results: dict[Path, Result]) -> dict[Path, str]:
    """The text that each generated file should have: `readme`, the README of `folder`, and the plots."""
    all_rows = folder / "README.md"
    table = markdown(results, readme.parent, all_rows)
    files = {
        readme: between_markers(readme.read_text(), table),
        all_rows: f"# Results\n\n{HEADER}\n\n{markdown(results, folder)}\n",
    }
    for path, result in results.items():
        charts = KINDS[kind(path)].charts
        if charts is not None:
            files[path.with_suffix(".svg")] = svg(charts(result))
    return files
