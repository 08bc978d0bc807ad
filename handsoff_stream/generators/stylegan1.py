"""The StyleGAN generator, with the feature maps that DatasetGAN reads.

Written from the papers: StyleGAN (Karras et al., CVPR 2019; "SG1" below), DatasetGAN (Zhang et al., CVPR 2021). Knows
square images from a 4x4 constant, with any channel table. Does not know file formats or labels.

Its hypercolumn has two maps per resolution: the output of the block, after adaptive instance normalization, and the
output of the block's second convolution, before noise, activation and normalization. It has 5088 channels at 1024 x
1024 pixels.

Shape letters: B batch, C channels, H W map size, D latent size, L number of style inputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators.base import Generator, Noise, Synthesis
from handsoff_stream.generators.layers import (
    LEAKY_GAIN,
    LEAKY_SLOPE,
    EqualizedLinear,
    choose_noise,
    filter_fir,
    normal,
    normalize,
)

BLUR_TAPS = (1.0, 2.0, 1.0)
NORM_EPSILON = 1e-5
FUSED_SIZE = 128
"""From this output size on, upsampling and convolution are one transposed convolution."""
PUBLISHED_NUM_WS = 18
"""The published mapping network repeats w 18 times for every image size."""


class EqualizedConv(nn.Module):
    """Convolution whose weight is scaled by gain / sqrt(fan_in) at run time (SG1, appendix C).

    With `up`, it follows an upsampling by 2 and is followed by the blur [1, 2, 1].
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, gain: float, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(normal(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = gain / (in_channels * kernel_size**2) ** 0.5
        self.up = up
        blur = torch.tensor([[a * b / sum(BLUR_TAPS) ** 2 for b in BLUR_TAPS] for a in BLUR_TAPS])
        self.register_buffer("blur", blur, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, in_channels, H, W] => [B, out_channels, H, W], or twice as high and wide with `up`."""
        weight = (self.weight * self.weight_gain).to(x_BCHW.dtype)
        bias = self.bias.to(x_BCHW.dtype)
        if not self.up:
            return F.conv2d(x_BCHW, weight, bias, padding=weight.shape[-1] // 2)
        if 2 * min(x_BCHW.shape[2:]) < FUSED_SIZE:
            out = F.conv2d(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"), weight, padding=1)
        else:
            wide = F.pad(weight, (1, 1, 1, 1))
            wide = wide[..., 1:, 1:] + wide[..., :-1, 1:] + wide[..., 1:, :-1] + wide[..., :-1, :-1]
            out = F.conv_transpose2d(x_BCHW, wide.transpose(0, 1), stride=2, padding=1)
        return filter_fir(out, self.get_buffer("blur"), pad=(1, 1)) + bias[:, None, None]


class Epilogue(nn.Module):
    """Scaled noise, leaky ReLU, and adaptive instance normalization by a style (SG1, equation 1)."""

    def __init__(self, channels: int, w_dim: int, *, size: int):
        super().__init__()
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.style = EqualizedLinear(w_dim, 2 * channels)
        self.register_buffer("noise_const", torch.zeros(1, 1, size, size))

    def forward(self, x_BCHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
        """The styled map [B, C, H, W]; `noise`: [1 or B, 1, H, W], or None for no noise."""
        if noise is not None:
            x_BCHW = x_BCHW + (noise * self.noise_strength[:, None, None]).to(x_BCHW.dtype)
        x_BCHW = F.instance_norm(F.leaky_relu(x_BCHW, LEAKY_SLOPE), eps=NORM_EPSILON)
        scale_BC, shift_BC = self.style(w_BD).to(x_BCHW.dtype).chunk(2, dim=1)
        return x_BCHW * (scale_BC + 1)[:, :, None, None] + shift_BC[:, :, None, None]


class Block(nn.Module):
    """The layers of one resolution: `up` (absent at the constant), epilogue, `conv`, epilogue."""

    def __init__(self, in_channels: int, channels: int, w_dim: int, *, size: int, first: bool):
        super().__init__()
        self.up = None if first else EqualizedConv(in_channels, channels, kernel_size=3, gain=LEAKY_GAIN, up=True)
        self.epilogue1 = Epilogue(channels, w_dim, size=size)
        self.conv = EqualizedConv(channels, channels, kernel_size=3, gain=LEAKY_GAIN)
        self.epilogue2 = Epilogue(channels, w_dim, size=size)

    def forward(self, x: Tensor, ws: Sequence[Tensor], maps: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Output of the block, and output of its second convolution, [B, C, H, W] each.

        `ws` and `maps` are the style inputs and the noise maps of the two epilogues.
        """
        if self.up is not None:
            x = self.up(x)
        convolved = self.conv(self.epilogue1(x, ws[0], maps[0]))
        return self.epilogue2(convolved, ws[1], maps[1]), convolved


class StyleGAN1(Generator):
    """The StyleGAN generator (Karras et al., CVPR 2019).

    Args:
        channels: channels per resolution, from the 4x4 constant upwards; their number decides the image size.
        z_dim: size of z.
        w_dim: size of w.
        mapping_layers: depth of the mapping network.
        mapping_lr_multiplier: learning-rate multiplier of the mapping network; scales its weights and biases.
        num_ws: style inputs L of w+; the network uses the first two per resolution and ignores the others.
        image_channels: channels of the image.

    Raises:
        ValueError: a size below 1, or fewer than two style inputs per resolution.
    """

    family = "stylegan1"

    def __init__(
        self,
        *,
        channels: Sequence[int],
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        mapping_lr_multiplier: float = 0.01,
        num_ws: int = PUBLISHED_NUM_WS,
        image_channels: int = 3,
    ):
        super().__init__()
        sizes = (*channels, z_dim, w_dim, mapping_layers, image_channels)
        if len(channels) < 1 or min(sizes) < 1 or num_ws < 2 * len(channels):
            raise ValueError(
                f"channels={list(channels)}, z_dim={z_dim}, w_dim={w_dim}, mapping_layers={mapping_layers}, "
                f"num_ws={num_ws}, image_channels={image_channels} describe no generator; pass positive integers, and "
                "at least two style inputs num_ws per resolution"
            )
        self.channels = tuple(channels)
        self._z_dim, self._w_dim, self._num_ws = z_dim, w_dim, num_ws
        self.mapping_lr_multiplier = mapping_lr_multiplier
        self.image_channels = image_channels
        self.mapping_network = nn.ModuleList(
            EqualizedLinear(z_dim if i == 0 else w_dim, w_dim, lr_multiplier=mapping_lr_multiplier, gain=LEAKY_GAIN)
            for i in range(mapping_layers)
        )
        self.constant = nn.Parameter(torch.ones(channels[0], 4, 4))
        self.constant_bias = nn.Parameter(torch.zeros(channels[0]))
        self.blocks = nn.ModuleList(
            Block(channels[max(i - 1, 0)], channels[i], w_dim, size=4 << i, first=i == 0) for i in range(len(channels))
        )
        self.to_rgb = EqualizedConv(channels[-1], image_channels, kernel_size=1, gain=1.0)
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @property
    def resolution(self) -> tuple[int, int]:
        """See `Generator.resolution`."""
        side = 4 << (len(self.channels) - 1)
        return side, side

    @property
    def num_ws(self) -> int:
        """See `Generator.num_ws`."""
        return self._num_ws

    @property
    def z_dim(self) -> int:
        """See `Generator.z_dim`."""
        return self._z_dim

    @property
    def w_dim(self) -> int:
        """See `Generator.w_dim`."""
        return self._w_dim

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """See `Generator.feature_channels`."""
        return tuple(c for channels in self.channels for c in (channels, channels))

    @property
    def feature_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Generator.feature_sizes`."""
        return self.noise_shapes

    @property
    def constant_map(self) -> None:
        """See `Generator.constant_map`."""
        return None

    @property
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        """See `Generator.noise_shapes`."""
        sides = [4 << i for i in range(len(self.channels))]
        return tuple((side, side) for side in sides for _ in range(2))

    def config(self) -> dict[str, Any]:
        """See `Generator.config`."""
        return {
            "channels": list(self.channels),
            "z_dim": self.z_dim,
            "w_dim": self.w_dim,
            "mapping_layers": len(self.mapping_network),
            "mapping_lr_multiplier": self.mapping_lr_multiplier,
            "num_ws": self.num_ws,
            "image_channels": self.image_channels,
        }

    def mapping(self, z_BD: Tensor, label: Tensor | None = None) -> Tensor:
        """See `Generator.mapping`."""
        if label is not None:
            raise ValueError(
                f"label is {list(label.shape)}, but this generator is unconditional; call mapping(z) without a label"
            )
        x = normalize(z_BD)
        for layer in self.mapping_network:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE)
        return x

    def synthesis(self, w_plus_BLD: Tensor, noise: Noise = "const", *, dtype: torch.dtype | None = None) -> Synthesis:
        """See `Generator.synthesis`."""
        if w_plus_BLD.ndim != 3 or w_plus_BLD.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(
                f"w_plus has shape {list(w_plus_BLD.shape)}, but this generator takes [B, {self.num_ws}, "
                f"{self.w_dim}]; use truncate(w) to repeat a single w"
            )
        ws = w_plus_BLD.unbind(1)
        maps = choose_noise(noise, [layer.get_buffer("noise_const") for layer in self._epilogues()])
        constant = self.constant + self.constant_bias[:, None, None]
        x = constant.to(dtype or constant.dtype).expand(len(w_plus_BLD), -1, -1, -1)
        features: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            pair = slice(2 * i, 2 * i + 2)
            x, convolved = block(x, ws[pair], maps[pair])
            features += [x, convolved]
        return Synthesis(self.to_rgb(x).float(), FeaturePyramid(tuple(features)))

    def _epilogues(self) -> Iterator[Epilogue]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield from (block.epilogue1, block.epilogue2)
