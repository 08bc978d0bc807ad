"""What a user sees: five panels for each image, and a page that shows names as they are."""

import html
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from handsoff_stream.checking.cross_validation import HeldOutLabels
from handsoff_stream.checking.findings import find
from handsoff_stream.checking.page import render_page
from handsoff_stream.checking.pictures import TITLES, differences, draw_panels, panel_size
from handsoff_stream.checking.report import CheckReport
from handsoff_stream.checking.table import MAX_ROWS, report_table
from handsoff_stream.preview import GAP, LINE, OPACITY, REJECTED, TILE_SIZE

PALETTE = [(0, 0, 0), (250, 0, 0), (0, 0, 250)]


def test_a_picture_has_five_panels_with_the_image_the_classes_and_the_errors():
    image, reconstruction = torch.full((3, 8, 16), 0.8), torch.full((3, 8, 16), 0.2)
    mask, label = np.ones((4, 8), dtype=np.int64), np.ones((4, 8), dtype=np.uint8)
    mask[:, 0] = 255
    label[0] = 2
    picture = draw_panels(image, reconstruction, mask, label, PALETTE)
    height, width = panel_size((8, 16))
    assert (height, width) == (TILE_SIZE // 2, TILE_SIZE)
    assert picture.size == (5 * width + 4 * GAP, LINE + height) and len(TITLES) == 5

    def at(panel, row, column):
        """Color of a label pixel of a panel, at its center."""
        scale = width // 8
        x, y = panel * (width + GAP) + column * scale + scale // 2, LINE + row * scale + scale // 2
        return picture.getpixel((x, y))

    def blended(color):
        return tuple(round((1 - OPACITY) * 204 + OPACITY * channel) for channel in color)

    assert at(0, 2, 4) == (204, 204, 204) and at(1, 2, 4) == (51, 51, 51)
    assert at(2, 2, 4) == blended((250, 0, 0)) and at(2, 2, 0) == blended((128, 128, 128))
    assert at(3, 2, 4) == blended((250, 0, 0)) and at(3, 0, 4) == blended((0, 0, 250))
    assert at(4, 0, 4) == REJECTED
    assert at(4, 2, 4) != REJECTED and at(4, 0, 0) != REJECTED  # right; not labelled


def test_errors_are_red_exactly_where_a_labelled_pixel_got_another_class():
    random = np.random.default_rng(0)
    image = random.integers(0, 100, (5, 6, 3)).astype(np.uint8)
    mask, label = random.choice([0, 1, 255], (5, 6)), random.choice([0, 1], (5, 6))
    red = (differences(image, mask, label) == REJECTED).all(axis=2)
    assert np.array_equal(red, (mask != label) & (mask != 255))


@pytest.mark.parametrize("size", [(1024, 1024), (16, 16), (512, 256), (3000, 1)])
def test_panels_of_large_and_small_images_have_one_size(size):
    assert max(panel_size(size)) == TILE_SIZE and min(panel_size(size)) >= 1


# The page ------------------------------------------------------------------------------------------------------------


def report_of(class_names, image_names, *, with_network=True):
    """A report on random labels; the last class is in no mask."""
    random = np.random.default_rng(0)
    num_images, num_classes = len(image_names), len(class_names)
    masks = random.integers(0, num_classes - 1, (num_images, 6, 6))

    def labels():
        return np.where(random.random(masks.shape) < 0.7, masks, 0).astype(np.uint8)

    folds = tuple((i,) for i in range(num_images))
    network = (labels(), labels()) if with_network else (None, None)
    held_out = HeldOutLabels(folds, folds, labels(), labels(), *network)
    findings = find(held_out, masks, image_names, class_names, [20.0] * num_images, seed=0)
    about = {"generator": "<g>.pkl", "settings": {"folds": num_images}, "versions": {"torch": "2"}}
    return CheckReport(findings, about)


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, format="PNG")
    return content.getvalue()


@pytest.mark.parametrize("with_network", [True, False])
def test_names_are_shown_and_never_interpreted(with_network):
    hostile = "<script>alert(1)</script>"
    names = ('"><img src=x onerror=alert(1)>', "b\x1b[31m\u202e", "{{ 7 * 7 }}")
    report = report_of(("ground", hostile, "\x00absent"), names, with_network=with_network)
    page = render_page(report, PALETTE, dict.fromkeys(names, png()))
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<img src=x" not in page and "onerror=alert(1)&gt;" in page
    assert "{{ 7 * 7 }}" in page and "&lt;g&gt;.pkl" in page
    assert not set(page) & {"\x00", "\x1b", "\u202e"}


def test_the_page_holds_its_pictures_and_loads_nothing():
    report = report_of(("a", "b", "c"), ("x", "y", "z"))
    page = render_page(report, PALETTE, dict.fromkeys("xyz", png()))
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page and "@import" not in page and "url(" not in page and "<link" not in page
    for sentence in report.verdict:
        assert sentence in html.unescape(page)


def test_a_class_without_any_pixel_is_in_the_record_the_page_and_the_table():
    report = report_of(("a", "b", "nowhere"), ("x", "y", "z"))
    record = report.record()["classes"][2]
    assert (record["name"], record["images"], record["labels"], record["network"]) == ("nowhere", 0, None, None)
    assert record["sentence"] == "No labelled image shows it, so the stream will never label it."
    assert "nowhere" in render_page(report, PALETTE, dict.fromkeys("xyz", png()))
    assert report_table(report).row_count == 3


def test_the_table_of_the_terminal_shows_the_worst_classes_of_many():
    report = report_of(tuple(f"class {k}" for k in range(30)), ("x", "y", "z"))
    table = report_table(report)
    assert table.row_count == MAX_ROWS and "14 more classes" in table.caption
    shown = {str(name) for name in table.columns[0].cells}
    labels = {c.name: c.labels for c in report.classes if c.labels is not None}
    assert max(labels[name] for name in shown) <= min(value for name, value in labels.items() if name not in shown)
