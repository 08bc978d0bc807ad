"""Images and masks of any size => the generator's: crop, resize, pad.

Knows rectangles. Does not know what pixels show, or where they come from.

Shape letters: H W image size. Rows before columns everywhere.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handsoff_stream.datasets.labelled_images.class_maps import IGNORE_INDEX

Size = tuple[int, int]
"""(H, W)."""
FITS = ("exact", "crop", "pad")


class Box(NamedTuple):
    """A rectangle of pixels; `bottom` and `right` are the first row and column beyond it."""

    top: float
    left: float
    bottom: float
    right: float

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def width(self) -> float:
        return self.right - self.left


class Placement(NamedTuple):
    """Which part of an image goes where."""

    source: Box
    """In the image; need not fall on whole pixels."""
    target: Box
    """In the result; whole pixels."""
    size: Size
    """Of the result."""


@dataclass(frozen=True)
class Geometry:
    """How images and masks get their size.

    `exact` changes nothing: another size is an error. `crop` takes the largest centred part of the wanted shape, and
    resizes it: full bodies of 1 : 2, streets, faces. `pad` keeps all of the image, and fills the rest with black,
    unlabelled pixels: StyleGAN2's cars are 384 x 512 images in rows 64 to 448 of 512 x 512 (HandsOff, published code).
    What no image of a set fills is not streamed, see `covered`.

    Images are resized by Lanczos with antialiasing, as the training images of StyleGAN2 were; masks take the nearest
    pixel.
    """

    size: Size | None = None
    """Of images, the generator's resolution; None: each keeps its own."""
    label_size: Size | None = None
    """Of masks, of the same shape as `size`; None: that of the image. HandsOff: 512 x 512 for 1024 x 1024 images."""
    fit: str = "exact"
    """One of `FITS`."""
    crop_box: tuple[int, int, int, int] | None = None
    """(top, left, bottom, right) in pixels of every image, taken before anything else."""

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit!r}; choose one of {', '.join(FITS)}")
        if self.size is None and (self.fit != "exact" or self.label_size is not None):
            raise ValueError("fit and label_size need the size of the images; pass size=(H, W)")
        for size in (self.size, self.label_size):
            if size is not None and min(size) < 1:
                raise ValueError(f"size {size}; a size is (H, W), both at least 1")
        if self.size is not None and self.label_size is not None and not same_shape(self.size, self.label_size):
            raise ValueError(
                f"label_size {size_text(self.label_size)} has another shape than size {size_text(self.size)}; "
                "divide both sides by the same number"
            )
        if self.crop_box is not None:
            top, left, bottom, right = self.crop_box
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(f"crop_box {self.crop_box}; it is (top, left, bottom, right), and not empty")

    def problem(self, image: Size) -> str | None:
        """What keeps an image of this size from being used; None if nothing does."""
        if self.crop_box is not None and (self.crop_box[2] > image[0] or self.crop_box[3] > image[1]):
            return f"{size_text(image)} pixels, the crop box {list(self.crop_box)} goes beyond"
        box = self._box(image)
        part = (round(box.height), round(box.width))
        if self.fit != "exact" or self.size is None or part == tuple(self.size):
            return None
        left = "" if self.crop_box is None else "the crop box leaves "
        wanted = f"the generator makes {size_text(self.size)}"
        return f"{left}{size_text(part)} pixels, {wanted}; resize it, or let fit be crop or pad"

    def place(self, image: Size) -> Placement:
        """Where the pixels of an image of this size go."""
        box = self._box(image)
        height, width = self.size or (round(box.height), round(box.width))
        whole = Box(0, 0, height, width)
        if self.fit == "crop":
            scale = max(height / box.height, width / box.width)
            part = min(height / scale, box.height), min(width / scale, box.width)  # against rounding
            return Placement(_centred(box, *part), whole, (height, width))
        if self.fit == "pad":
            scale = min(height / box.height, width / box.width)
            target = _centred(whole, max(1, round(box.height * scale)), max(1, round(box.width * scale)))
            return Placement(box, Box(*(math.floor(edge) for edge in target)), (height, width))
        return Placement(box, whole, (height, width))

    def covered(self, images: Iterable[Size]) -> Box | None:
        """The smallest part of the result, in whole label pixels, that holds all images of these sizes; None: all."""
        targets = [self.place(image).target for image in images]
        if self.fit != "pad" or self.size is None or not targets:
            return None
        height, width = self.label_size or self.size
        step_y, step_x = self.size[0] // math.gcd(self.size[0], height), self.size[1] // math.gcd(self.size[1], width)
        tops, lefts, bottoms, rights = zip(*targets, strict=True)
        part = Box(
            math.floor(min(tops) / step_y) * step_y,
            math.floor(min(lefts) / step_x) * step_x,
            math.ceil(max(bottoms) / step_y) * step_y,
            math.ceil(max(rights) / step_x) * step_x,
        )
        return None if part == Box(0, 0, *self.size) else part

    def image(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] => uint8 [H, W, 3] of `size`, black where padded."""
        place = self.place((image_HW3.shape[0], image_HW3.shape[1]))
        top, left, bottom, right = (int(edge) for edge in place.target)
        corners = (place.source.left, place.source.top, place.source.right, place.source.bottom)
        part = Image.fromarray(image_HW3).resize((right - left, bottom - top), Image.Resampling.LANCZOS, box=corners)
        result = np.zeros((*place.size, 3), dtype=np.uint8)
        result[top:bottom, left:right] = np.asarray(part)
        return result

    def mask(self, mask_HW: NDArray[np.uint8], image: Size) -> NDArray[np.uint8]:
        """[H, W] of class ids, of the image's shape => the same of `label_size`, unlabelled where padded.

        A pixel takes the id under its centre. `image`: (H, W) of the image before any change.
        """
        place = self.place(image)
        size = self.label_size or place.size
        # The same map from result to source as the image's, for rows and for columns.
        (rows, inside_rows), (columns, inside_columns) = (
            _nearest(size[axis], place, axis, mask_HW.shape[axis] / image[axis]) for axis in (0, 1)
        )
        ids = mask_HW[rows[:, None], columns]
        ids[~(inside_rows[:, None] & inside_columns)] = IGNORE_INDEX
        return ids

    def _box(self, image: Size) -> Box:
        return Box(0, 0, *image) if self.crop_box is None else Box(*self.crop_box)


def _nearest(count: int, place: Placement, axis: int, scale: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(source index, whether there is a source) of each of `count` result pixels along an axis.

    `scale`: mask pixels for one image pixel.
    """
    start, end = place.source[axis], place.source[axis + 2]
    low, high = place.target[axis], place.target[axis + 2]
    position = (np.arange(count) + 0.5) * place.size[axis] / count
    source = start + (position - low) * (end - start) / (high - low)
    inside = (position > low) & (position < high)
    # Clipped where there is no source, and against rounding.
    index = np.floor(source * scale).astype(np.int64).clip(math.floor(start * scale), math.ceil(end * scale) - 1)
    return index, inside


def _centred(box: Box, height: float, width: float) -> Box:
    """A box of this size in the middle of another."""
    top, left = box.top + (box.height - height) / 2, box.left + (box.width - width) / 2
    return Box(top, left, top + height, left + width)


def same_shape(first: Size, second: Size) -> bool:
    """Whether one is the other, larger or smaller."""
    return first[0] * second[1] == first[1] * second[0]


def size_text(size: Size) -> str:
    """For messages."""
    return f"{size[0]} x {size[1]}"
