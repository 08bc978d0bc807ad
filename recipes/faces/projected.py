"""A projected discriminator: light heads on frozen, randomly mixed ImageNet features (Sauer et al., NeurIPS 2021).

`FrozenFeatures` of `handsoff_stream.imagenet` gives an EfficientNet-Lite0's maps at `STRIDES`. `RandomProjection` mixes
them across channels and scales by fixed random convolutions (section 3.2 of the paper). `ProjectedHeads` has those
convolutions and one trained head per scale. Images are augmented first (`augment`); otherwise heads on such good
features soon classify every image correctly.

Knows images, features and logits. Does not know losses, optimizers, or the discriminator that is trained from scratch.

Shape letters: B batch, C channels, H W map size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from handsoff_stream.imagenet import CHANNELS

STRIDES = (4, 8, 16, 32)
"""Of the feature maps that the heads see."""
MAX_SHIFT = 1 / 8
CUTOUT = 1 / 3


class RandomProjection(nn.Module):
    """Four maps => four maps of `width` channels, mixed across channels and then from coarse to fine; not trained."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.across_channels = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.across_scales = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in channels)
        for parameter in self.parameters():
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        self.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C_l, h, w], finest first => maps [B, width, h, w] of the same sizes."""
        mixed: list[Tensor] = []
        for project, mix, x in reversed(list(zip(self.across_channels, self.across_scales, maps, strict=True))):
            x = project(x)
            if mixed:
                coarser = F.interpolate(mixed[0], size=x.shape[2:], mode="bilinear", align_corners=False)
                x = (x + coarser) * math.sqrt(0.5)
            mixed.insert(0, mix(x))
        return mixed


def head(width: int, size: int) -> nn.Sequential:
    """Map [B, width, size, size] => logits [B, 1, 1, 1]: spectrally normalized, halved until 4 x 4 are left."""
    layers: list[nn.Module] = []
    while size > 4:
        layers += [spectral_norm(nn.Conv2d(width, width, 4, 2, 1)), nn.GroupNorm(4, width), nn.LeakyReLU(0.2)]
        size //= 2
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(width, 1, size)))


def augment(images_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Random brightness, saturation, contrast, shift and cut-out, differentiable (Zhao et al., NeurIPS 2020).

    Args:
        images_BCHW: float32 in [-1, 1]; the result may leave that range.
        rng: a generator of the CPU; six numbers per image are drawn from it.
    """
    b, _, h, w = images_BCHW.shape
    draws = torch.rand(7, b, 1, 1, 1, generator=rng).to(images_BCHW.device)
    x = images_BCHW + (draws[0] - 0.5)
    gray = x.mean(dim=1, keepdim=True)
    x = gray + (x - gray) * (draws[1] * 2)
    middle = x.mean(dim=(1, 2, 3), keepdim=True)
    x = middle + (x - middle) * (draws[2] + 0.5)
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    dy, dx = (((draws[i] * 2 - 1) * MAX_SHIFT * size).round().long() for i, size in ((3, h), (4, w)))
    from_y, from_x = rows + dy[:, 0], columns + dx[:, 0]  # [B, H, 1], [B, 1, W]
    inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)
    y0, x0 = (draws[5] * h)[:, 0], (draws[6] * w)[:, 0]
    hole = ((rows - y0).abs() < CUTOUT * h / 2) & ((columns - x0).abs() < CUTOUT * w / 2)
    index = (from_y.clamp(0, h - 1) * w + from_x.clamp(0, w - 1)).flatten(1)[:, None]
    shifted = x.flatten(2).gather(2, index.expand(-1, x.shape[1], -1)).view_as(x)
    return shifted * (inside & ~hole)[:, None]


class ProjectedHeads(nn.Module):
    """Features of images => logits float32 [4, B], high for real images, one row per scale.

    Args:
        size: height and width of the images, a power of two; at least `MIN_SIZE`, the coarsest features' stride.
        width: channels of the mixed maps.
    """

    MIN_SIZE = 32

    def __init__(self, *, size: int, width: int = 64):
        super().__init__()
        self.projection = RandomProjection([CHANNELS[stride] for stride in STRIDES], width)
        self.heads = nn.ModuleList(head(width, size // stride) for stride in STRIDES)

    def mix(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The random projection of the maps of `FrozenFeatures`: four maps [B, width, h, w] in the same dtype."""
        with torch.autocast(maps[0].device.type, dtype=maps[0].dtype, enabled=maps[0].dtype != torch.float32):
            mixed: list[Tensor] = self.projection(maps)
        return mixed

    def forward(self, mixed: Sequence[Tensor]) -> Tensor:
        """Logits float32 [4, B] of the maps that `mix` returns."""
        with torch.autocast(mixed[0].device.type, dtype=mixed[0].dtype, enabled=mixed[0].dtype != torch.float32):
            logits = [head(x).flatten() for head, x in zip(self.heads, mixed, strict=True)]
        return torch.stack(logits).float()
