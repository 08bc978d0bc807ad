"""The encoder networks: images => offsets of latents in W+.

A backbone that reduces 16-fold, and one small convolutional head for each style input. The backbone is one of ReStyle's
(Alaluf et al., ICCV 2021), IR-SE50 of ArcFace or ResNet-34, or an EfficientNet-Lite0, which starts from ImageNet
weights. pSp encoders (Richardson et al., CVPR 2021) predict every style by itself, e4e ones (Tov et al., SIGGRAPH 2021)
the first, and the others' offsets from it. Heads read the deepest map, or a feature pyramid of three maps.

ReStyle's modules are named as in the published files, but for the stem. Knows networks and their geometry. Does not
know files, generators or the iteration.

Shape letters: B batch, C channels, H W image size, h w map size, L number of style inputs, D latent size.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.generators.layers import EqualizedLinear
from handsoff_stream.imagenet import CHANNELS, efficientnet_lite0

PUBLISHED_UNITS = {"ir_se50": (3, 4, 14, 3), "resnet34": (3, 4, 6, 3)}
"""Backbone => residual units of its four stages."""
EFFICIENTNET = "efficientnet-lite0"
STAGE_STRIDES = {"ir_se50": (2, 2, 2, 2), "resnet34": (1, 2, 2, 2)}  # after a stem of stride 1 and 2
SQUEEZE = 16
COARSE_STYLES, MIDDLE_STYLES = 3, 7  # with a pyramid: styles below read the deepest map, below the middle one


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Geometry of an encoder: everything but the weights.

    Raises:
        ValueError: a geometry that no encoder has.
    """

    backbone: str
    """"ir_se50", "resnet34" or "efficientnet-lite0"."""
    widths: tuple[int, ...] = ()
    """Channels of the stem and of the four stages; (64, 64, 128, 256, 512) in the published ones. None of
    efficientnet-lite0, whose sizes are fixed."""
    units: tuple[int, ...] = ()
    """Residual units of the four stages; likewise."""
    num_ws: int
    w_dim: int
    image_size: tuple[int, int]
    """(H, W) that images are brought to before they enter; (256, 256) in most of the published ones."""
    input_channels: int = 6
    """6: image and current reconstruction; 3: the image alone, encoded in one pass."""
    pyramid: bool = False
    """Whether heads read a feature pyramid of strides 16, 8 and 4, or the deepest map only."""
    offsets: bool = False
    """Whether codes are offsets from the first one (e4e) or independent (pSp)."""
    crop: bool = False
    """Whether the encoder sees the middle three quarters of a generator's rows only (cars)."""
    iterations: int = 5
    """Passes that it was trained for."""

    def __post_init__(self) -> None:
        sizes = (*self.widths, *self.units, self.num_ws, self.w_dim, self.iterations)
        counts = (0, 0) if self.backbone == EFFICIENTNET else (5, 4)
        known = self.backbone in (EFFICIENTNET, *STAGE_STRIDES)
        if not known or (len(self.widths), len(self.units)) != counts or min(sizes) < 1:
            raise ValueError(
                f"backbone={self.backbone!r}, widths={self.widths}, units={self.units}, num_ws={self.num_ws}, "
                f"w_dim={self.w_dim}, iterations={self.iterations} describe no encoder; pass a backbone of "
                f"{sorted(STAGE_STRIDES)}, 5 widths and 4 counts of units, all positive, or {EFFICIENTNET!r} without "
                "widths and units"
            )
        if self.backbone == EFFICIENTNET and self.pyramid:
            raise ValueError(f"{EFFICIENTNET} has no feature pyramid here; leave out pyramid=True, or pass another one")
        if not 32 <= min(self.image_size) <= max(self.image_size) <= 1024 or self.input_channels not in (3, 6):
            raise ValueError(
                f"image_size={self.image_size}, input_channels={self.input_channels}: an encoder sees 32 to 1024 "
                "pixels per side, in 3 channels (the image) or 6 (the image and its reconstruction)"
            )
        if self.input_channels == 3 and self.iterations != 1:
            raise ValueError(
                f"iterations={self.iterations}, but an encoder that sees no reconstruction makes 1 pass; pass 1"
            )

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class StyleEncoder(nn.Module):
    """Image and reconstruction => a step in W+; `restyle.encode` takes the steps.

    `latent_avg`: float32 [L, D], where the first step starts.

    With an EfficientNet-Lite0 there is also `latent_std`, float32 [D], in units of which the heads predict, and heads
    of offsets from the first code start at zero. Its weights are random until `load_imagenet` is called.
    """

    latent_avg: Tensor
    latent_std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.backbone == EFFICIENTNET:
            self.features = efficientnet_lite0((16,), pretrained=False, input_channels=config.input_channels)
            self.register_buffer("latent_std", torch.ones(config.w_dim))
            channels = CHANNELS[16]
        else:
            channels = self._add_residual_backbone(config)
        self.styles = nn.ModuleList(
            StyleHead(channels, config.w_dim, math.ceil(max(config.image_size) / self._stride(j)))
            for j in range(config.num_ws)
        )
        if config.backbone == EFFICIENTNET and config.offsets:
            for head in list(self.styles)[1:]:
                assert isinstance(head, StyleHead)
                nn.init.zeros_(head.linear.weight)
        self.register_buffer("latent_avg", torch.zeros(config.num_ws, config.w_dim))

    def _add_residual_backbone(self, config: EncoderConfig) -> int:
        """Add the modules of ReStyle's backbones; returns the channels of the deepest map."""
        stem, *stages = config.widths
        kernel, stride = (3, 1) if config.backbone == "ir_se50" else (7, 2)
        self.stem = nn.Sequential(
            nn.Conv2d(config.input_channels, stem, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(stem),
            nn.PReLU(stem),
        )
        self.body = nn.ModuleList(_units(config))
        if config.pyramid:
            self.latlayer1 = nn.Conv2d(stages[2], stages[3], 1)
            self.latlayer2 = nn.Conv2d(stages[1], stages[3], 1)
        return stages[3]

    def load_imagenet(self) -> None:
        """Give an EfficientNet-Lite0 its ImageNet weights; a reconstruction among the inputs has no influence at first.

        Raises:
            FileNotFoundError: the package with the weights is not installed.
        """
        trained = efficientnet_lite0((16,), pretrained=True, input_channels=self.config.input_channels)
        self.features.load_state_dict(trained.state_dict())

    def forward(self, inputs_BCHW: Tensor) -> Tensor:
        """The step.

        Args:
            inputs_BCHW: float32 [B, input_channels, *config.image_size] in [-1, 1]; the image, then what the
                generator makes of the current latent.

        Returns:
            float32 [B, L, D], to be added to the current latent.
        """
        maps = self._maps(inputs_BCHW)
        codes_BLD = torch.stack([head(maps[self._stride(j)]) for j, head in enumerate(self.styles)], dim=1)
        if self.config.backbone == EFFICIENTNET:
            codes_BLD = codes_BLD * self.latent_std
        if not self.config.offsets:
            return codes_BLD
        return torch.cat([codes_BLD[:, :1], codes_BLD[:, :1] + codes_BLD[:, 1:]], dim=1)

    def _stride(self, style: int) -> int:
        """Of the map that a style's head reads."""
        if not self.config.pyramid or style < COARSE_STYLES:
            return 16
        return 8 if style < MIDDLE_STYLES else 4

    def _maps(self, x: Tensor) -> dict[int, Tensor]:
        """Stride => map; without a pyramid that of stride 16 only."""
        if self.config.backbone == EFFICIENTNET:
            return {16: self.features(x)[0]}
        x = self.stem(x)
        stage_outputs = []
        units = iter(self.body)
        for count in self.config.units:
            for _ in range(count):
                x = next(units)(x)
            stage_outputs.append(x)
        if not self.config.pyramid:
            return {16: x}
        middle = _enlarge(x, self.latlayer1(stage_outputs[2]))
        return {16: x, 8: middle, 4: _enlarge(middle, self.latlayer2(stage_outputs[1]))}


class StyleHead(nn.Module):
    """[B, C, h, w] => [B, D]: convolutions of stride 2 down to one pixel, then a linear layer (pSp, "map2style")."""

    def __init__(self, channels: int, w_dim: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(max(1, math.ceil(math.log2(size)))):
            layers += [nn.Conv2d(w_dim if i else channels, w_dim, 3, 2, 1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualizedLinear(w_dim, w_dim)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Floating point [B, C, h, w] => [B, D]."""
        return self.linear(self.convs(x_BChw).flatten(1))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a function of their means (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(1, channels // SQUEEZE), 1, bias=False)
        self.fc2 = nn.Conv2d(max(1, channels // SQUEEZE), channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] => the same shape."""
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))


class ImprovedResidual(nn.Module):
    """Residual unit of IR-SE50 (ArcFace, Deng et al., CVPR 2019): normalization first, no activation after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            SqueezeExcitation(channels),
        )
        self.shortcut_layer = None if in_channels == channels else _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] => [B, channels, h / stride, w / stride]."""
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return self.res_layer(x) + shortcut


class BasicBlock(nn.Module):
    """Residual unit of ResNet-34 (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.downsample = None if same else _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] => [B, channels, h / stride, w / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def _units(config: EncoderConfig) -> Iterator[nn.Module]:
    unit = ImprovedResidual if config.backbone == "ir_se50" else BasicBlock
    channels = config.widths[0]
    stages = zip(config.widths[1:], config.units, STAGE_STRIDES[config.backbone], strict=True)
    for width, count, stride in stages:
        for i in range(count):
            yield unit(channels, width, stride if i == 0 else 1)
            channels = width


def _enlarge(deep_BChw: Tensor, lateral_BChw: Tensor) -> Tensor:
    """Top-down step of the feature pyramid; corners aligned, as in the published networks."""
    size = lateral_BChw.shape[2:]
    return F.interpolate(deep_BChw, size, mode="bilinear", align_corners=True) + lateral_BChw
