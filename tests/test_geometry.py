"""The rectangle type: the order of its edges, its size, and where an output of a part of an image lies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handsoff_stream.geometry import Rectangle

PART = Rectangle(top=2, left=4, bottom=14, right=10)


def test_sides_and_spans_follow_from_the_edges():
    assert tuple(PART) == (2, 4, 14, 10)
    assert (PART.height, PART.width) == PART.size == (12, 6)
    assert PART.rows == (2, 14) and PART.columns == (4, 10)


def test_a_rectangle_is_read_back_from_the_names_of_its_edges_in_any_order():
    """As the manifests of checkpoints store it."""
    assert Rectangle(**{"top": 2, "bottom": 14, "left": 4, "right": 10}) == PART
    assert Rectangle(**PART._asdict()) == PART


@pytest.mark.parametrize(
    "edges", [(-1, 0, 4, 4), (0, 0, 17, 4), (0, -1, 4, 4), (0, 0, 4, 9), (4, 0, 4, 4), (0, 4, 4, 4)]
)
def test_a_rectangle_outside_of_the_image_or_empty_is_refused(edges):
    PART.check((16, 10))
    with pytest.raises(ValueError, match="do not fit into 16 x 8 pixels; give first < end"):
        Rectangle(*edges).check((16, 8))


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5)
)
def test_an_output_at_a_whole_scale_lies_at_the_scaled_edges(height, width, top, left, below, scale):
    part = Rectangle(top, left, top + height, left + width)
    whole = (top + height + below, left + width)
    full, corner = part.placement((height * scale, width * scale), whole)
    assert full == (whole[0] * scale, whole[1] * scale) and corner == (top * scale, left * scale)


def test_an_output_that_would_cut_pixels_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="5 output pixels over pixels 4:16 of 16 .* choose a positive multiple of 3"):
        Rectangle(4, 0, 16, 16).placement((5, 16), (16, 16))
