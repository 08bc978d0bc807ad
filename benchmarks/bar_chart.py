"""Bar charts as SVG text, written by hand: the same numbers give the same bytes, and no plotting library is needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 720, 250, 90
BAR, GAP, HEAD = 18, 6, 34
COLOR, BACKGROUND, INK = "#3b6ea5", "#ffffff", "#222222"


@dataclass(frozen=True)
class Chart:
    """Horizontal bars from zero, the longest as wide as there is room."""

    title: str
    bars: Sequence[tuple[str, float]]
    """Label and value; values below zero are drawn as nothing, their number is shown."""


def svg(charts: Sequence[Chart]) -> str:
    """The charts, one under the other."""
    parts: list[str] = []
    top = 0
    for chart in charts:
        parts += _text(12, top + 22, chart.title, weight="bold")
        top += HEAD
        longest = max(value for _, value in chart.bars)
        for label, value in chart.bars:
            width = (WIDTH - LEFT - RIGHT) * max(value, 0.0) / longest if longest > 0 else 0.0
            middle = top + BAR - 5
            parts += _text(LEFT - 8, middle, label, anchor="end")
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{COLOR}"/>')
            parts += _text(LEFT + width + 6, middle, f"{value:,.4g}")
            top += BAR + GAP
    frame = f'<rect width="{WIDTH}" height="{top + GAP}" fill="{BACKGROUND}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top + GAP}" font-family="sans-serif">'
    return "\n".join([head, frame, *parts, "</svg>", ""])


def _text(x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal") -> list[str]:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="13" fill="{INK}"'
    return [f'<text x="{x:.1f}" y="{y}" {style}>{escape(content)}</text>']
