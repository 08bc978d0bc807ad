"""What a benchmark says about its result: rows for the tables, and charts for the plot.

Each benchmark defines a `Presentation` beside its measurement; `benchmarks.report.kinds` lists them. Knows neither
files nor Markdown, nor any single benchmark.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.bar_chart import Chart

Result = dict[str, Any]
"""The content of one result file."""


@dataclass(frozen=True)
class Row:
    """One row of the tables, apart from its ratio's unit and its result file, which the table adds."""

    what: str
    """What is measured, and in which setting."""
    ours: str
    """The measurement of this project, with its unit."""
    other: str
    """What it is compared with, with its unit."""
    ratio: float | None
    """How many times better `ours` is than `other`; None where no such number makes sense."""
    headline: bool = False
    """Whether README.md shows this row too; results/README.md shows every row."""


@dataclass(frozen=True)
class Presentation:
    """How results of one kind are shown."""

    rows: Callable[[Result], list[Row]]
    charts: Callable[[Result], Sequence[Chart]] | None = None
    """None: results of this kind have no plot."""


def setting(result: Result) -> str:
    """Checkpoint, label size in pixels, and those options of the stream that are not the defaults."""
    height, width = result["geometry"]["label"]
    return ", ".join([result["settings"]["checkpoint"], f"{height} x {width}", *result["settings"].get("option", [])])
