"""One picture for each labelled image: image, reconstruction, mask, label, and where label and mask differ.

Knows how to draw. Does not know what the labels were learned from.

Shape letters: H W image size, h w label size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from handsoff_stream.class_ids import IGNORE_INDEX, Color
from handsoff_stream.geometry import Size
from handsoff_stream.preview import GAP, INK, LINE, PAPER, REJECTED, TEXT, TILE_SIZE, Pixels, overlay

TITLES = ("image", "reconstruction", "mask", "label", "label differs from mask")
UNLABELLED: Color = (128, 128, 128)
DIMMED = 0.35  # brightness of the image under the differences


def draw_panels(
    image_3HW: Tensor,
    reconstruction_3HW: Tensor,
    mask_hw: NDArray[np.integer],
    label_hw: NDArray[np.integer],
    palette: Sequence[Color],
) -> Image.Image:
    """Five panels side by side under their titles, each about 192 pixels wide or high.

    Args:
        image_3HW: float32 in [0, 1].
        reconstruction_3HW: the same size and range.
        mask_hw: class ids, 255 where unlabelled; drawn over the image.
        label_hw: class ids; drawn over the image.
        palette: color of each class.
    """
    height, width = panel_size((image_3HW.shape[1], image_3HW.shape[2]))
    image = _resized(image_3HW, (height, width))
    colors = [*palette, *[UNLABELLED] * (IGNORE_INDEX + 1 - len(palette))]
    mask, label = (_nearest(ids, (height, width)) for ids in (mask_hw, label_hw))
    panels = (
        image,
        _resized(reconstruction_3HW, (height, width)),
        overlay(image, mask, colors),
        overlay(image, label, colors),
        differences(image, mask, label),
    )
    picture = Image.new("RGB", (len(panels) * (width + GAP) - GAP, LINE + height), PAPER)
    draw = ImageDraw.Draw(picture)
    for place, (title, panel) in enumerate(zip(TITLES, panels, strict=True)):
        left = place * (width + GAP)
        draw.text((left, 0), title, fill=INK, font=ImageFont.load_default(TEXT))
        picture.paste(Image.fromarray(panel), (left, LINE))
    return picture


def panel_size(image: Size) -> Size:
    """(H, W) of a panel: the longer side is 192 pixels.

    Args:
        image: (H, W) of the image.
    """
    scale = TILE_SIZE / max(image)
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def differences(image_HW3: Pixels, mask_HW: NDArray[np.integer], label_HW: NDArray[np.integer]) -> Pixels:
    """The image in dark gray, red where a labelled pixel got another class; uint8 [H, W, 3]."""
    gray_HW1 = DIMMED * image_HW3.mean(axis=2, keepdims=True)
    wrong_HW = (mask_HW != IGNORE_INDEX) & (mask_HW != label_HW)
    shown: Pixels = np.where(wrong_HW[..., None], np.array(REJECTED), gray_HW1).round().astype(np.uint8)
    return shown


def _resized(image_3HW: Tensor, size: Size) -> Pixels:
    pixels = image_3HW.mul(255).round().byte().permute(1, 2, 0).numpy()
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _nearest(ids_hw: NDArray[Any], size: Size) -> NDArray[np.uint8]:
    picture = Image.fromarray(ids_hw.astype(np.uint8))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.NEAREST))
