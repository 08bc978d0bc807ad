"""A check as a table for the terminal, at most a screen long.

Knows rich. Does not know how anything was computed.
"""

from rich.table import Table
from rich.text import Text

from handsoff_stream.checking.findings import ClassFinding
from handsoff_stream.checking.report import CheckReport
from handsoff_stream.checking.scores import Estimate
from handsoff_stream.checking.words import plain, signed
from handsoff_stream.errors import printable

MAX_ROWS = 16


def report_table(report: CheckReport) -> Table:
    """One row for each class, the worst labelled ones if there are more than 16, and their mean."""
    summary = report.summary
    with_network = summary.network is not None
    table = Table(title="IoU on held-out images", show_footer=True)
    table.add_column("class", footer="mean", overflow="fold")
    table.add_column("images", justify="right")
    if with_network:
        table.add_column("network", justify="right", footer=_mean(summary.network))
        table.add_column("on recon-\nstructions", justify="right", footer=_mean(summary.network_on_reconstruction))
    table.add_column("label\ngenerator", justify="right", footer=_mean(summary.labels))
    if with_network:
        table.add_column("lost in\ninversion", justify="right", footer=_signed(summary.lost_in_inversion))
        table.add_column("lost in\nlabelling", justify="right", footer=_signed(summary.lost_in_labelling))
    shown = list(report.classes)
    if len(shown) > MAX_ROWS:
        worst = sorted(shown, key=lambda c: 1.0 if c.labels is None else c.labels)[:MAX_ROWS]
        shown = [c for c in shown if c in worst]
        table.caption = f"{len(report.classes) - MAX_ROWS} more classes, labelled better, are in report.html"
    for found in shown:
        table.add_row(*_row(found, with_network=with_network))
    return table


def _row(found: ClassFinding, *, with_network: bool) -> list[Text | str]:
    row: list[Text | str] = [Text(printable(found.name)), str(found.images)]
    if with_network:
        row += [_iou(found.network), _iou(found.network_on_reconstruction)]
    row.append(_iou(found.labels))
    if with_network:
        row += [_signed(found.lost_in_inversion), _signed(found.lost_in_labelling)]
    return row


def _iou(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _mean(estimate: Estimate | None) -> str:
    return "" if estimate is None else plain(estimate)


def _signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else signed(estimate)
