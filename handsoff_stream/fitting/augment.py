"""Views of the few labelled images: moved a little, in another light, hats in other colours; with labels that fit.

A label generator knows what it was shown. From one blue cap it learns that this blue, on top of a head, is a hat; from
views of it in other colours, that a cap is. Views are inverted like the images themselves, so each costs an inversion.
Not part of HandsOff, and no sure gain: the embedded faces ship without, because two views an image did not help there;
a wider variant did (recipes/faces/log.md).

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
class ViewSettings:
    """How many views, and how far they go."""

    per_image: int = 0
    """Views of an image whose classes all images show; one with rarer classes gets more, see `repeat_factors`."""
    flip: bool = False
    """Mirror every other view, from the second. Not where left and right are classes of their own, or the generator
    never mirrors."""
    any_color: tuple[int, ...] = ()
    """Ids of classes that come in every colour, such as hats: their hue turns freely. Black, grey and white stay so."""
    degrees: float = 6.0
    """Rotation, at most, either way."""
    shift: float = 0.04
    """Translation, at most, either way, as a share of the image."""
    zoom: float = 1.08
    """Magnification, at most, and its inverse, at least."""
    hue: float = 0.02
    """Of the whole image, but for what comes in every colour: at most, either way, in turns."""
    light: float = 0.3
    """Brightness and saturation: factors 1 - light to 1 + light."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_image < 0:
            raise ValueError(f"per_image={self.per_image} is no count; pass 0 for no views, or how many")
        if not (0 <= self.degrees < math.inf and 0 <= self.shift < 1 and 1 <= self.zoom < math.inf):
            raise ValueError(
                f"degrees={self.degrees}, shift={self.shift}, zoom={self.zoom}: rotation is 0 or more, the shift in "
                "[0, 1), the zoom 1 or more"
            )
        if not (0 <= self.hue <= ANY_HUE and 0 <= self.light <= 1):
            raise ValueError(f"hue={self.hue}, light={self.light}: the hue is in [0, {ANY_HUE}], the light in [0, 1]")
        check_seed(self.seed)

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def repeat_factors(masks_Nhw: Tensor, num_classes: int) -> list[float]:
    """Of each image the largest sqrt(1 / f) among its classes, f being the share of images that show the class.

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


def with_views(
    images: Sequence[tuple[str, Tensor]], masks_Nhw: Tensor, num_classes: int, settings: ViewSettings
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Images and masks, then their views: image `name` becomes `name.view-00`, `name.view-01`, ...

    A view depends on the seed, the image's name and the view's number; like photographs, views have 8 bits a channel.

    Args:
        images: (name, float32 [3, H, W] in [0, 1]).
        masks_Nhw: int64, one for each image, of any size; an id outside [0, num_classes) is unlabelled and stays so.

    Raises:
        ValueError: another number of masks, or a class of `any_color` that there is not.
    """
    if not all(0 <= c < num_classes for c in settings.any_color):
        raise ValueError(
            f"any_color={settings.any_color} names classes that are not among {num_classes}; pass their ids"
        )
    if len(masks_Nhw) != len(images):
        raise ValueError(f"{len(images)} images and {len(masks_Nhw)} masks; pass one mask for each image")
    more, masks = list(images), list(masks_Nhw)
    factors = repeat_factors(masks_Nhw, num_classes)
    for (name, image), mask, factor in zip(images, masks_Nhw, factors, strict=True):
        for number in range(round(settings.per_image * factor)):
            random = _random(settings.seed, name, number)
            flip = settings.flip and number % 2 == 1
            view, moved = view_of(image, mask, settings, random, flip=flip)
            more.append((f"{name}.view-{number:02d}", view))
            masks.append(moved)
    return more, torch.stack(masks)


def view_of(
    image_3HW: Tensor, mask_hw: Tensor, settings: ViewSettings, random: torch.Generator, *, flip: bool
) -> tuple[Tensor, Tensor]:
    """One view of an image in [0, 1], [3, H, W], and of its mask, [h, w]; what was outside repeats the border."""
    image_3HW = _recoloured(image_3HW, mask_hw, settings, random)
    motion = _motion(image_3HW.shape[1] / image_3HW.shape[2], settings, random)
    if flip:
        image_3HW, mask_hw = image_3HW.flip(2), mask_hw.flip(1)
    image_3HW = _moved(image_3HW, motion, "bilinear").clamp(0, 1).mul(255).round().div(255)
    return image_3HW, _moved(mask_hw[None].double(), motion, "nearest")[0].long()  # double holds every id


def _recoloured(image_3HW: Tensor, mask_hw: Tensor, settings: ViewSettings, random: torch.Generator) -> Tensor:
    """One light for everything, and another for each class of any colour."""
    mask_HW = F.interpolate(mask_hw[None, None].double(), image_3HW.shape[1:], mode="nearest-exact")[0, 0]
    view = _in_another_light(image_3HW, settings.hue, settings.light, random)
    for c in settings.any_color:
        view = torch.where(mask_HW == c, _in_another_light(image_3HW, ANY_HUE, settings.light, random), view)
    return view


def _in_another_light(image_3HW: Tensor, hue: float, light: float, random: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    image_3HW = functional.adjust_hue(image_3HW, _between(-hue, hue, random))
    image_3HW = functional.adjust_brightness(image_3HW, _between(1 - light, 1 + light, random))
    return functional.adjust_saturation(image_3HW, _between(1 - light, 1 + light, random))


def _motion(aspect: float, settings: ViewSettings, random: torch.Generator) -> Tensor:
    """Rotation, zoom and shift, [1, 2, 3]: output => input, where both sides run from -1 to 1.

    `aspect`: height over width, so that a rotation stays one.
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
