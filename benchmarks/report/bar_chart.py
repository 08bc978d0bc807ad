"""Bar charts as SVG text, written by hand: equal numbers give equal bytes, and no plotting library is needed.

Lengths are in pixels. Knows how a bar is drawn. Does not know what is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 720, 250, 90
BAR_HEIGHT, BAR_GAP, TITLE_HEIGHT = 18, 6, 34
BAR_COLOR, BACKGROUND_COLOR, TEXT_COLOR = "#3b6ea5", "#ffffff", "#222222"


@dataclass(frozen=True)
class Chart:
    """One group of horizontal bars that start at zero; the longest fills the width that is left for bars."""

    title: str
    bars: Sequence[tuple[str, float]]
    """Label and value of each bar; a value below zero has a bar of length 0, and its number is shown."""


def svg(charts: Sequence[Chart]) -> str:
    """An SVG document with the charts one below the other."""
    parts: list[str] = []
    top = 0
    for chart in charts:
        parts += _text(12, top + 22, chart.title, weight="bold")
        top += TITLE_HEIGHT
        longest = max(value for _, value in chart.bars)
        for label, value in chart.bars:
            width = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) * max(value, 0.0) / longest if longest > 0 else 0.0
            baseline = top + BAR_HEIGHT - 5
            parts += _text(LABEL_WIDTH - 8, baseline, label, anchor="end")
            size = f'width="{width:.1f}" height="{BAR_HEIGHT}"'
            parts.append(f'<rect x="{LABEL_WIDTH}" y="{top}" {size} fill="{BAR_COLOR}"/>')
            parts += _text(LABEL_WIDTH + width + 6, baseline, f"{value:,.4g}")
            top += BAR_HEIGHT + BAR_GAP
    height = top + BAR_GAP
    frame = f'<rect width="{WIDTH}" height="{height}" fill="{BACKGROUND_COLOR}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, frame, *parts, "</svg>", ""])


def _text(x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal") -> list[str]:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="13" fill="{TEXT_COLOR}"'
    return [f'<text x="{x:.1f}" y="{y}" {style}>{escape(content)}</text>']
