"""Images and masks of any size => the generator's size: cut out, resize, pad.

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

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.geometry import Rectangle, Size

Edges = tuple[float, float, float, float]
"""(top, left, bottom, right) of a part whose edges need not fall on whole pixels."""
RESIZES = ("exact", "crop", "pad")
"""What becomes of an image of another size, see `Geometry`."""


class Placement(NamedTuple):
    """Which part of an image goes where."""

    source: Edges
    """In the image."""
    target: Rectangle
    """In the result."""
    size: Size
    """Of the result."""


@dataclass(frozen=True)
class Geometry:
    """How images and masks are brought to the wanted size.

    `exact` changes nothing: an image of another size is an error. `crop` takes the largest centered part of the wanted
    shape and resizes it, as for full bodies of 1 : 2, streets and faces. `pad` keeps the whole image and fills the rest
    with black, unlabelled pixels: StyleGAN2's cars are 384 x 512 images in rows 64 to 448 of 512 x 512 (HandsOff,
    published code). The part that no image of a set fills is not streamed, see `covered`.

    Images are resized by Lanczos with antialiasing, as the training images of StyleGAN2 were; masks take the nearest
    pixel.

    Raises:
        ValueError: an unknown way to resize, a size below 1, labels of another shape than the images, or an empty
            crop box.
    """

    size: Size | None = None
    """Of images, the generator's resolution; None: each keeps its own."""
    label_size: Size | None = None
    """Of masks, of the same shape as `size`; None: that of the image. HandsOff: 512 x 512 for 1024 x 1024 images."""
    resize: str = "exact"
    """How an image of another size is brought to `size`; one of `RESIZES`."""
    crop_box: Rectangle | None = None
    """In pixels of every image; cut out before anything else."""

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ValueError(f"resize={self.resize!r} is unknown; choose one of {', '.join(RESIZES)}")
        if self.size is None and (self.resize != "exact" or self.label_size is not None):
            raise ValueError(
                f"resize={self.resize!r} and label_size={self.label_size} need the size of the images; pass size=(H, W)"
            )
        for size in (self.size, self.label_size):
            if size is not None and min(size) < 1:
                raise ValueError(f"size {size} has no pixels; a size is (H, W), both at least 1")
        if self.size is not None and self.label_size is not None and not same_shape(self.size, self.label_size):
            raise ValueError(
                f"label_size {size_text(self.label_size)} has another shape than size {size_text(self.size)}; "
                "divide both sides by the same number"
            )
        if self.crop_box is not None:
            top, left, bottom, right = self.crop_box
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(
                    f"crop_box {tuple(self.crop_box)} is empty or begins outside the image; pass (top, left, bottom, "
                    "right) with 0 <= top < bottom and 0 <= left < right"
                )

    def problem(self, image: Size) -> str | None:
        """What keeps an image of this size from being used, in words; None if nothing does."""
        if self.crop_box is not None and (self.crop_box.bottom > image[0] or self.crop_box.right > image[1]):
            return f"{size_text(image)} pixels, the crop box {list(self.crop_box)} goes beyond"
        part = self._box(image).size
        if self.resize != "exact" or self.size is None or part == tuple(self.size):
            return None
        left = "" if self.crop_box is None else "the crop box leaves "
        wanted = f"the generator makes {size_text(self.size)}"
        return f"{left}{size_text(part)} pixels, {wanted}; resize the image, or pass resize crop or pad"

    def place(self, image: Size) -> Placement:
        """Where the pixels of an image of this size go."""
        box = self._box(image)
        height, width = self.size or box.size
        whole = Rectangle(0, 0, height, width)
        if self.resize == "crop":
            scale = max(height / box.height, width / box.width)
            # Rounding must not make the part larger than the box.
            part = min(height / scale, box.height), min(width / scale, box.width)
            return Placement(_centered(box, *part), whole, (height, width))
        if self.resize == "pad":
            scale = min(height / box.height, width / box.width)
            target = _centered(whole, max(1, round(box.height * scale)), max(1, round(box.width * scale)))
            top, left, bottom, right = (math.floor(edge) for edge in target)
            return Placement(box, Rectangle(top, left, bottom, right), (height, width))
        return Placement(box, whole, (height, width))

    def covered(self, images: Iterable[Size]) -> Rectangle | None:
        """The smallest part of the result, in whole label pixels, that holds all images of these sizes.

        None if that is the whole result, as it always is unless the geometry pads.
        """
        targets = [self.place(image).target for image in images]
        if self.resize != "pad" or self.size is None or not targets:
            return None
        height, width = self.label_size or self.size
        step_y, step_x = self.size[0] // math.gcd(self.size[0], height), self.size[1] // math.gcd(self.size[1], width)
        tops, lefts, bottoms, rights = zip(*targets, strict=True)
        part = Rectangle(
            math.floor(min(tops) / step_y) * step_y,
            math.floor(min(lefts) / step_x) * step_x,
            math.ceil(max(bottoms) / step_y) * step_y,
            math.ceil(max(rights) / step_x) * step_x,
        )
        return None if part == (0, 0, *self.size) else part

    def image(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] => uint8 [H, W, 3] of `size`, black where padded."""
        place = self.place((image_HW3.shape[0], image_HW3.shape[1]))
        top, left, bottom, right = place.source
        columns_and_rows = (place.target.width, place.target.height)  # PIL counts columns first
        part = Image.fromarray(image_HW3).resize(
            columns_and_rows, Image.Resampling.LANCZOS, box=(left, top, right, bottom)
        )
        result = np.zeros((*place.size, 3), dtype=np.uint8)
        result[slice(*place.target.rows), slice(*place.target.columns)] = np.asarray(part)
        return result

    def mask(self, mask_HW: NDArray[np.uint8], image: Size) -> NDArray[np.uint8]:
        """Class ids at label size; a pixel takes the id under its center.

        Args:
            mask_HW: uint8 [H, W] of class ids, of the image's shape at any scale.
            image: (H, W) of the image before any change.

        Returns:
            uint8 [H, W] of `label_size`, 255 (unlabelled) where padded.
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

    def _box(self, image: Size) -> Rectangle:
        return Rectangle(0, 0, *image) if self.crop_box is None else self.crop_box


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


def _centered(box: Rectangle, height: float, width: float) -> Edges:
    """A part of this size in the middle of a rectangle."""
    top, left = box.top + (box.height - height) / 2, box.left + (box.width - width) / 2
    return top, left, top + height, left + width


def same_shape(first: Size, second: Size) -> bool:
    """Whether both sizes have the same proportions."""
    return first[0] * second[1] == first[1] * second[0]


def size_text(size: Size) -> str:
    """A size as messages write it: "384 x 512", rows first."""
    return f"{size[0]} x {size[1]}"
