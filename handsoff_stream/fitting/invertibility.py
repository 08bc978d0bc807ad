"""Which pixels of the labelled images their inversions lack, so that no label is learned from them.

A latent does not always make everything that its image shows: glasses vanish, and the features at their pixels are
those of skin. Such parts are out of the generator's domain, and an invertibility mask says where they are (Yang et al.,
ICCV 2023, arXiv 2212.09262). That paper trains a network to predict the mask, because a threshold on the reconstruction
error also takes in-domain parts that are merely inaccurate. Here it is such a threshold: for fitting, it is enough to
lose no labels of the wrong features, and smoothing and perceptual features soften small shifts. For pixel p of image x
and its reconstruction y:

    P(p) = perceptual difference of x and y at p, see `Perceptual.difference`
    M(p) = mean over colors of (x - y)^2, of colors in [-1, 1]
    d(p) = sqrt((g * P)(p)) / m_P / 2 + sqrt((g * M)(p)) / m_M / 2

g is a Gaussian with a standard deviation of 1/64 of the image's shorter side. m_P and m_M are medians of the two roots
over the labelled set, but at least `PERCEPTUAL_FLOOR` and `PIXEL_FLOOR`: the median of each class's pixels, and then
the median of these over the classes. So d is about 1 in a typical class, in any domain and with any distance. (The
median over all pixels is that of the background, which is easy; with it, eyes and other small parts with much detail
are left out first.) Pixels with d above a factor are left out.

Knows images, latents and masks. Does not know how latents are found, or how labels are learned.

Shape letters: N images, B batch, L number of style inputs, D latent size, H W image size, h w label size.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.fitting.inversion.store import ImageList
from handsoff_stream.generators import Generator

DEFAULT_FACTOR = 2.0
SMOOTHING = 1 / 64
PERCEPTUAL_FLOOR = 0.05
PIXEL_FLOOR = 2 / 255
"""One step of 8-bit colors. The floors keep rounding errors of an exact inversion from being left out."""
REPORTED_SHARE = 0.5
"""A class of an image is reported if more than this share of its pixels is left out."""


@dataclass(frozen=True)
class LostPixels:
    """What was left out of fitting."""

    factor: float
    share: float
    """Of all labelled pixels."""
    classes: dict[str, dict[str, float]]
    """Image => class => share of its pixels in this image, where that is more than `REPORTED_SHARE`."""
    gone: tuple[str, ...]
    """Classes that images show, but of which no pixel is left in any image: they are never predicted."""

    def config(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint's provenance."""
        return {"factor": self.factor, "left_out": self.share, "classes": self.classes, "gone": list(self.gone)}


def check_factor(factor: float) -> None:
    """Refuse a factor that is not above 1.

    Raises:
        ValueError: such a factor, which would leave out half of the pixels or more.
    """
    if not 1 < factor < math.inf:
        raise ValueError(
            f"invertibility={factor} leaves out half of the labelled pixels or more; pass a number above 1, or None "
            "to leave nothing out"
        )


def leave_out_lost(
    generator: Generator,
    images: ImageList,
    w_plus_NLD: Tensor,
    masks_Nhw: Tensor,
    perceptual: Perceptual,
    class_names: Sequence[str],
    factor: float,
    *,
    trusted: Collection[str] = (),
) -> tuple[Tensor, LostPixels]:
    """Masks to fit to, without the pixels that the inversions lack.

    Args:
        generator, images, w_plus_NLD, perceptual, factor: as for `lost_pixels`.
        masks_Nhw: int64 class ids; anything outside [0, number of classes) is unlabelled.
        class_names: in the order of their ids.
        trusted: names of images that were not inverted here, of which nothing is left out; at most N - 1 of them.

    Returns:
        As `without_lost_pixels`.

    Raises:
        ValueError, NotImplementedError: as `lost_pixels`.
    """
    checked = [i for i, (name, _) in enumerate(images) if name not in trusted]
    lost_Nhw = torch.zeros_like(masks_Nhw, dtype=torch.bool)
    lost_Nhw[checked] = lost_pixels(
        generator,
        [images[i] for i in checked],
        w_plus_NLD[checked],
        perceptual,
        masks_Nhw[checked],
        len(class_names),
        factor,
    )
    return without_lost_pixels(masks_Nhw, lost_Nhw, [name for name, _ in images], class_names, factor)


def without_lost_pixels(
    masks_Nhw: Tensor, lost_Nhw: Tensor, names: Sequence[str], class_names: Sequence[str], factor: float
) -> tuple[Tensor, LostPixels]:
    """Masks whose lost pixels are unlabelled, and what they have lost.

    Args:
        masks_Nhw: int64 class ids; anything outside [0, number of classes) is unlabelled.
        lost_Nhw: bool, see `lost_pixels`.
        names: of the N images.
        class_names: in the order of their ids.
        factor: for the report.

    Returns:
        A copy of the masks with `IGNORE_INDEX` at lost pixels, int64 [N, h, w]; and the report.
    """
    labelled_Nhw = (masks_Nhw >= 0) & (masks_Nhw < len(class_names))
    lost_Nhw = lost_Nhw & labelled_Nhw
    classes: dict[str, dict[str, float]] = {}
    gone = []
    for label, class_name in enumerate(class_names):
        of_class_Nhw = masks_Nhw == label
        pixels_N, lost_N = of_class_Nhw.sum(dim=(1, 2)), (of_class_Nhw & lost_Nhw).sum(dim=(1, 2))
        for name, pixels, lost in zip(names, pixels_N.tolist(), lost_N.tolist(), strict=True):
            if lost > REPORTED_SHARE * pixels:
                classes.setdefault(name, {})[class_name] = lost / pixels
        if 0 < pixels_N.sum() == lost_N.sum():
            gone.append(class_name)
    share = int(lost_Nhw.sum()) / max(1, int(labelled_Nhw.sum()))
    report = LostPixels(factor, share, {name: classes[name] for name in names if name in classes}, tuple(gone))
    return masks_Nhw.masked_fill(lost_Nhw, IGNORE_INDEX), report


@torch.no_grad()
def lost_pixels(
    generator: Generator,
    images: ImageList,
    w_plus_NLD: Tensor,
    perceptual: Perceptual,
    masks_Nhw: Tensor,
    num_classes: int,
    factor: float = DEFAULT_FACTOR,
) -> Tensor:
    """Where reconstructions lack what their images show.

    Args:
        generator: its device does the work.
        images: (name, float32 [3, H, W] in [0, 1]) of the generator's resolution.
        w_plus_NLD: float32, the latent of each image.
        perceptual: the image distance; moved to the generator's device.
        masks_Nhw: int64 class ids. Medians are over labelled pixels, for example without the bars of padded images;
            anything outside [0, num_classes) is unlabelled.
        num_classes: how many classes there are.
        factor: see the module's formula.

    Returns:
        bool [N, h, w] on the CPU.

    Raises:
        ValueError: a factor that is not above 1.
        NotImplementedError: a distance without `maps`.
    """
    check_factor(factor)
    size = (masks_Nhw.shape[1], masks_Nhw.shape[2])
    pairs = zip(images, w_plus_NLD, strict=True)
    roots = [_differences(generator, image, w_plus_LD, perceptual, size) for (_, image), w_plus_LD in pairs]
    roots_2Nhw = torch.stack(roots, dim=1)
    of_classes = [roots_2Nhw[:, masks_Nhw == label] for label in range(num_classes)]
    medians = [of_class.median(dim=1).values for of_class in of_classes if of_class.shape[1]]
    if not medians:
        return torch.zeros_like(masks_Nhw, dtype=torch.bool)
    typical_2 = torch.stack(medians).median(dim=0).values.maximum(torch.tensor([PERCEPTUAL_FLOOR, PIXEL_FLOOR]))
    return (roots_2Nhw / typical_2[:, None, None, None]).mean(dim=0) > factor


def _differences(
    generator: Generator, image_3HW: Tensor, w_plus_LD: Tensor, perceptual: Perceptual, size: tuple[int, int]
) -> Tensor:
    """The roots of the smoothed perceptual and pixel difference of one image, float32 [2, h, w] on the CPU."""
    from torchvision.transforms.v2.functional import gaussian_blur

    device = generator.w_avg.device
    target_1CHW = image_3HW[None].to(device, torch.float32) * 2 - 1
    made_1CHW = generator.synthesis(w_plus_LD[None].to(device, torch.float32), "const").images
    perceptual_1HW = perceptual.to(device).difference(target_1CHW, made_1CHW)
    squared_2HW = torch.cat([perceptual_1HW, (target_1CHW - made_1CHW).square().mean(dim=1)])
    sigma = SMOOTHING * min(squared_2HW.shape[1:])
    smooth_2HW = gaussian_blur(squared_2HW, kernel_size=2 * math.ceil(2 * sigma) + 1, sigma=sigma)
    return F.interpolate(smooth_2HW[None], size, mode="area")[0].sqrt().cpu()
