"""Sizes and rectangles of pixels: the one order in which the package counts edges.

Rows come before columns, and the start before the end: (H, W) for a size, (top, left, bottom, right) for a rectangle.
Knows numbers. Does not know images, feature maps or what lies in a rectangle.
"""

import math
from typing import NamedTuple

Size = tuple[int, int]
"""(H, W) in pixels."""


class Rectangle(NamedTuple):
    """A part of an image, in its pixels; `bottom` and `right` are the first row and column beyond the part."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.right - self.left

    @property
    def size(self) -> Size:
        """(H, W)."""
        return self.height, self.width

    @property
    def rows(self) -> tuple[int, int]:
        """(first, end); the end is exclusive."""
        return self.top, self.bottom

    @property
    def columns(self) -> tuple[int, int]:
        """(first, end); the end is exclusive."""
        return self.left, self.right

    def check(self, whole: Size) -> None:
        """Check that the rectangle is a part of an image of (H, W) `whole`.

        Raises:
            ValueError: the rectangle is empty or reaches beyond the image.
        """
        height, width = whole
        if not (0 <= self.top < self.bottom <= height and 0 <= self.left < self.right <= width):
            raise ValueError(
                f"rows {self.top}:{self.bottom}, columns {self.left}:{self.right} do not fit into {height} x {width} "
                "pixels; give first < end within the image"
            )

    def placement(self, size: Size, whole: Size) -> tuple[Size, Size]:
        """Where an output of `size` lies that shows this part of an image of (H, W) `whole`.

        Returns:
            (H, W) of the whole image at the output's scale, and (top, left) of the output in it.

        Raises:
            ValueError: the edges of the part would cut output pixels.
        """
        full_height, top = _place(size[0], whole[0], self.top, self.bottom)
        full_width, left = _place(size[1], whole[1], self.left, self.right)
        return (full_height, full_width), (top, left)


def _place(count: int, source: int, first: int, end: int) -> tuple[int, int]:
    """(full, start): `count` output pixels over pixels `first .. end - 1` are pixels `start ..` of `full`."""
    step = (end - first) // math.gcd(source, first, end - first)
    if count <= 0 or count % step:
        raise ValueError(
            f"{count} output pixels over pixels {first}:{end} of {source} would cut pixels at the edge of "
            f"the crop; choose a positive multiple of {step}"
        )
    return count * source // (end - first), count * first // (end - first)
