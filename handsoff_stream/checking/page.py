"""A check as one HTML page, which holds its pictures and loads nothing.

Every name is escaped by Jinja, and control characters are replaced before. Knows the report and the template
`page.html`. Does not know how anything was computed.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from handsoff_stream.checking.report import CheckReport
from handsoff_stream.checking.words import plain, signed
from handsoff_stream.class_ids import Color
from handsoff_stream.errors import printable

MAX_TEXT = 2000  # characters of a sentence


def render_page(report: CheckReport, palette: Sequence[Color], pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        report: what was found.
        palette: display color of each class.
        pictures: name of an image => its picture, PNG.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": signed, "plain": plain, "text": lambda text: printable(str(text), MAX_TEXT)}
    return environment.get_template("page.html").render(
        report=report,
        classes=list(zip(report.classes, report.class_sentences, palette, strict=True)),
        images=list(zip(report.images, report.image_sentences, strict=True)),
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
    )
