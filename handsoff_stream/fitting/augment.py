"""Augmentations of the few labelled images: moved slightly, in another light, classes recolored; with labels that fit.

A label generator knows only what it was shown. If the one hat among the labelled images is blue, it may learn that
everything blue on top of a head is a hat; copies in other colors show that the shape decides. Augmented images are
inverted like the images themselves, so each costs an inversion. Not part of HandsOff, and not certain to help: the
embedded faces were fitted without, because two augmentations per image did not help there, while more of them with more
varied light did (recipes/faces/log.md).

Knows images and id masks. Does not know generators, files or what classes mean.

Shape letters: N images, H W image size, h w label size.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.seeding import check_seed

ANY_HUE = 0.5
"""Half a turn of the hue either way."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """How many augmentations per image, and how strong they are.

    Raises:
        ValueError: a setting out of its range.
    """

    per_image: int = 0
    """Augmentations of an image whose classes all images show; an image with rarer classes gets more of them, see
    `repeat_factors`."""
    flip: bool = False
    """Mirror every other augmentation, from the second. Not for labels that tell left from right, and not for a
    generator that was trained without mirrored images."""
    any_color: tuple[int, ...] = ()
    """Ids of classes that occur in any color, such as hats: their hue is drawn freely. Black, gray and white stay."""
    degrees: float = 6.0
    """Largest rotation, either way."""
    shift: float = 0.04
    """Largest translation, either way, as a share of the image."""
    zoom: float = 1.08
    """Largest magnification; the smallest is its inverse."""
    hue: float = 0.02
    """Largest change of hue, either way, in turns; of everything but the classes of `any_color`."""
    light: float = 0.3
    """Brightness and saturation are multiplied by factors from 1 - light to 1 + light."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_image < 0:
            raise ValueError(f"per_image={self.per_image} is not a count; pass 0 for no augmentations, or how many")
        if not (0 <= self.degrees < math.inf and 0 <= self.shift < 1 and 1 <= self.zoom < math.inf):
            raise ValueError(
                f"degrees={self.degrees}, shift={self.shift}, zoom={self.zoom} are out of range; pass a rotation of "
                "0 or more, a shift in [0, 1), and a zoom of 1 or more"
            )
        if not (0 <= self.hue <= ANY_HUE and 0 <= self.light <= 1):
            raise ValueError(
                f"hue={self.hue}, light={self.light} are out of range; pass a hue in [0, {ANY_HUE}] and a light "
                "in [0, 1]"
            )
        check_seed(self.seed)

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def repeat_factors(masks_Nhw: Tensor, num_classes: int) -> list[float]:
    """Of each image the largest sqrt(1 / f) among its classes, where f is the share of images that show the class.

    Repeat factor sampling (Gupta et al., LVIS, CVPR 2019) with a threshold of 1: a class in one image of 16 makes this
    image count four times. 1 for an image without a labelled pixel.

    Args:
        masks_Nhw: int64; an id outside [0, num_classes) is unlabelled.

    Returns:
        N numbers, each 1 or more.
    """
    shows = torch.stack([(masks_Nhw == c).flatten(1).any(dim=1) for c in range(num_classes)], dim=1)
    rarity = (len(masks_Nhw) / shows.sum(dim=0).clamp(min=1)).sqrt()
    return [float(factor) for factor in torch.where(shows, rarity, 1.0).amax(dim=1)]


def with_augmentations(
    images: Sequence[tuple[str, Tensor]], masks_Nhw: Tensor, num_classes: int, settings: AugmentationSettings
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Images and masks, followed by their augmentations: `name.augmented-00`, `name.augmented-01`, ... of image `name`.

    An augmentation depends on the seed, the image's name and the number of the augmentation. Like photographs,
    augmented images have 8 bits per channel.

    Args:
        images: (name, float32 [3, H, W] in [0, 1]).
        masks_Nhw: int64, one for each image, of any size; an id outside [0, num_classes) is unlabelled and stays so.
        num_classes: of the masks.
        settings: how many, and how strong.

    Returns:
        (name, float32 [3, H, W] in [0, 1]) of all, and their masks, int64 [N + augmentations, h, w].

    Raises:
        ValueError: another number of masks, or an id in `any_color` that is not a class.
    """
    if not all(0 <= c < num_classes for c in settings.any_color):
        raise ValueError(
            f"any_color={settings.any_color} names classes that are not among {num_classes}; pass ids from 0 on"
        )
    if len(masks_Nhw) != len(images):
        raise ValueError(f"{len(images)} images and {len(masks_Nhw)} masks; pass one mask for each image")
    more, masks = list(images), list(masks_Nhw)
    factors = repeat_factors(masks_Nhw, num_classes)
    for (name, image), mask, factor in zip(images, masks_Nhw, factors, strict=True):
        for number in range(round(settings.per_image * factor)):
            random = _random(settings.seed, name, number)
            flip = settings.flip and number % 2 == 1
            augmented, moved_mask = augment(image, mask, settings, random, flip=flip)
            more.append((f"{name}.augmented-{number:02d}", augmented))
            masks.append(moved_mask)
    return more, torch.stack(masks)


def augment(
    image_3HW: Tensor, mask_hw: Tensor, settings: AugmentationSettings, random: torch.Generator, *, flip: bool
) -> tuple[Tensor, Tensor]:
    """One augmentation of an image and its mask; what comes into view from outside repeats the border.

    Args:
        image_3HW: float32 in [0, 1].
        mask_hw: int64.
        settings: how far to go at most.
        random: where the changes are drawn from.
        flip: mirror as well.

    Returns:
        The image on 8-bit levels, and the mask, of the same shapes and types.
    """
    image_3HW = _recolored(image_3HW, mask_hw, settings, random)
    motion = _motion(image_3HW.shape[1] / image_3HW.shape[2], settings, random)
    if flip:
        image_3HW, mask_hw = image_3HW.flip(2), mask_hw.flip(1)
    image_3HW = _moved(image_3HW, motion, "bilinear").clamp(0, 1).mul(255).round().div(255)
    return image_3HW, _moved(mask_hw[None].double(), motion, "nearest")[0].long()  # double holds every id


def _recolored(image_3HW: Tensor, mask_hw: Tensor, settings: AugmentationSettings, random: torch.Generator) -> Tensor:
    """One light for everything, and another for each class of any color."""
    mask_HW = F.interpolate(mask_hw[None, None].double(), image_3HW.shape[1:], mode="nearest-exact")[0, 0]
    recolored = _in_another_light(image_3HW, settings.hue, settings.light, random)
    for c in settings.any_color:
        of_class = _in_another_light(image_3HW, ANY_HUE, settings.light, random)
        recolored = torch.where(mask_HW == c, of_class, recolored)
    return recolored


def _in_another_light(image_3HW: Tensor, hue: float, light: float, random: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    image_3HW = functional.adjust_hue(image_3HW, _between(-hue, hue, random))
    image_3HW = functional.adjust_brightness(image_3HW, _between(1 - light, 1 + light, random))
    return functional.adjust_saturation(image_3HW, _between(1 - light, 1 + light, random))


def _motion(aspect: float, settings: AugmentationSettings, random: torch.Generator) -> Tensor:
    """Rotation, zoom and shift, [1, 2, 3]: output => input, where both sides run from -1 to 1.

    `aspect`: height over width, so that a rotation keeps angles.
    """
    angle = math.radians(_between(-settings.degrees, settings.degrees, random))
    zoom = settings.zoom ** _between(-1, 1, random)
    right, down = (2 * _between(-settings.shift, settings.shift, random) for _ in range(2))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    return torch.tensor([[[cos, -sin * aspect, right], [sin / aspect, cos, down]]], dtype=torch.float64)


def _moved(maps_CHW: Tensor, motion: Tensor, mode: str) -> Tensor:
    grid = F.affine_grid(motion.to(maps_CHW.dtype), [1, 1, *maps_CHW.shape[1:]], align_corners=False)
    return F.grid_sample(maps_CHW[None], grid, mode=mode, padding_mode="border", align_corners=False)[0]


def _random(seed: int, name: str, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _between(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))
