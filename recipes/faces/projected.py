"""A projected discriminator: light heads on frozen, randomly mixed ImageNet features (Sauer et al., NeurIPS 2021).

`FrozenFeatures` gives an EfficientNet-Lite0's maps at strides 4, 8, 16 and 32. `RandomProjection` mixes them across
channels and scales by fixed random convolutions (section 3.2 of the paper). `ProjectedHeads` has those convolutions and
one trained head per scale. Images are augmented first (`augment`); otherwise heads on such good features soon classify
every image correctly.

Knows images, features and logits. Does not know losses, optimizers, or the discriminator that is trained from scratch.

Shape letters: B batch, C channels, H W map size.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm

from handsoff_stream.downstream.efficientnet import packaged_weights, timm_names

MAX_SHIFT = 1 / 8
CUTOUT = 1 / 3


def imagenet_efficientnet_lite0() -> nn.Module:
    """timm's EfficientNet-Lite0 as a pyramid of features, with the ImageNet weights of the installed package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    stored = timm_names(torch.load(packaged_weights(), map_location="cpu", weights_only=True))
    network: nn.Module = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    )
    # Head and classifier are left out.
    network.load_state_dict({name: stored[f"model.{name}"] for name in network.state_dict()})
    return network


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each timm BatchNorm into the convolution before it, in place; its activation stays."""
    children = list(module.named_children())
    for (name, child), (next_name, following) in zip(children, children[1:], strict=False):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(child, following))
            setattr(module, next_name, cast(Any, following).act)
    for child in module.children():
        fold_batch_norms(child)


class FrozenFeatures(nn.Module):
    """Images float32 [B, 3, H, W] in [-1, 1] => four maps [B, C_l, H / s, W / s] for strides s of 4, 8, 16 and 32.

    The network was trained on pixels in (-1, 1), so images need no normalization.
    """

    channels = (24, 40, 112, 320)

    def __init__(self) -> None:
        super().__init__()
        self.network = imagenet_efficientnet_lite0().eval().requires_grad_(False)
        fold_batch_norms(self.network)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """The four maps, finest first, in the dtype of the weights."""
        dtype = next(self.network.parameters()).dtype
        return cast(list[Tensor], self.network(images_BCHW.to(dtype).contiguous(memory_format=torch.channels_last)))


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
        self.projection = RandomProjection(FrozenFeatures.channels, width)
        self.heads = nn.ModuleList(head(width, size // stride) for stride in (4, 8, 16, 32))

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
