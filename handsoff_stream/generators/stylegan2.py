"""StyleGAN2 in plain PyTorch operations: nothing is compiled at install or first use.

From the papers' text: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below), StyleGAN (Karras et al., CVPR 2019; "SG1").
Knows the skip architecture, constants of any shape and any channel table. Does not know file formats, labels, or
training losses.

Shape letters: B batch, I input channels, O output channels, H W map size, D latent size, L number of style inputs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators.base import Generator, Noise, Synthesis

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)
LEAKY_SLOPE = 0.2
LEAKY_GAIN = math.sqrt(2.0)  # keeps unit variance through a leaky ReLU
EPSILON = 1e-8


def fir_kernel(gain: float = 1.0) -> Tensor:
    """Separable low-pass filter [1, 3, 3, 1] that follows every zero-insertion (SG2, appendix B); sums to `gain`."""
    taps = torch.tensor(FIR_TAPS)
    kernel = torch.outer(taps, taps)
    return kernel * (gain / kernel.sum())


def filter_fir(x_BCHW: Tensor, kernel: Tensor, pad: tuple[int, int], stride: int = 1) -> Tensor:
    """Every channel through the same FIR kernel, `pad` zeros before and after on both axes."""
    channels = x_BCHW.shape[1]
    weight = kernel.to(x_BCHW.dtype).expand(channels, 1, -1, -1)
    if pad[0] != pad[1]:
        return F.conv2d(F.pad(x_BCHW, (*pad, *pad)), weight, stride=stride, groups=channels)
    return F.conv2d(x_BCHW, weight, padding=pad[0], stride=stride, groups=channels)


def upsample(x_BCHW: Tensor, kernel: Tensor) -> Tensor:
    """Filtered 2x up-sampling of the skip image: zero-insertion, then FIR with gain 4."""
    b, c, h, w = x_BCHW.shape
    spread = x_BCHW.new_zeros(b, c, 2 * h, 2 * w)
    spread[:, :, ::2, ::2] = x_BCHW
    return filter_fir(spread, kernel, pad=(2, 1))


def activate(x_BCHW: Tensor, bias_C: Tensor, clamp: float | None) -> Tensor:
    """Bias, leaky ReLU with unit-variance gain, optional clamp."""
    shape = [1, -1] + [1] * (x_BCHW.ndim - 2)
    out = F.leaky_relu(x_BCHW + bias_C.to(x_BCHW.dtype).view(shape), LEAKY_SLOPE).mul(LEAKY_GAIN)
    return out if clamp is None else out.clamp(-clamp, clamp)


class EqualizedLinear(nn.Module):
    """Linear layer with run-time weight scale 1/sqrt(fan_in), "equalized learning rate" (SG1, appendix C)."""

    def __init__(self, in_features: int, out_features: int, *, bias_init: float = 0.0, lr_multiplier: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled by a style and whose output is demodulated (SG2, equations 1-3).

    Scaling the activations instead of the weights is the same product and lets a whole batch share one dense
    convolution: conv(x, W * s) * d == conv(x * s, W) * d, with d = rsqrt(sum (W * s)^2 + eps).
    """

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, *, kernel_size: int, up: bool, demodulate: bool
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight_gain = 1.0 / math.sqrt(in_channels * kernel_size**2)
        self.up = up
        self.demodulate = demodulate
        self.register_buffer("kernel", fir_kernel(gain=4.0), persistent=False)

    def forward(self, x_BIHW: Tensor, w_BD: Tensor) -> Tensor:
        style_BI = self.affine(w_BD)
        weight_OIkk = self.weight * self.weight_gain
        x_BIHW = x_BIHW * style_BI.to(x_BIHW.dtype)[:, :, None, None]
        if self.up:
            out = F.conv_transpose2d(x_BIHW, weight_OIkk.transpose(0, 1).to(x_BIHW.dtype), stride=2)
            out = filter_fir(out, self.get_buffer("kernel"), pad=(1, 1))
        else:
            out = F.conv2d(x_BIHW, weight_OIkk.to(x_BIHW.dtype), padding=weight_OIkk.shape[-1] // 2)
        if not self.demodulate:
            return out
        energy_BO = style_BI.square() @ weight_OIkk.square().sum(dim=(2, 3)).T
        return out * (energy_BO + EPSILON).rsqrt().to(out.dtype)[:, :, None, None]


class StyleLayer(nn.Module):
    """Modulated 3x3 convolution, scaled noise, bias, activation (SG2, figure 2c). Its output is a feature map."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        *,
        up: bool,
        size: tuple[int, int],
        clamp: float | None,
    ):
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, w_dim, kernel_size=3, up=up, demodulate=True)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.clamp = clamp
        self.size = size
        self.register_buffer("noise_const", torch.randn(1, 1, *size))

    def forward(self, x_BIHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
        out = self.conv(x_BIHW, w_BD)
        if noise is not None:
            out = out + (noise * self.noise_strength).to(out.dtype)
        return activate(out, self.bias, self.clamp)


class ToRGB(nn.Module):
    """1x1 modulated convolution without demodulation, to image channels, added to the skip image (SG2, figure 7b)."""

    def __init__(self, in_channels: int, image_channels: int, w_dim: int, *, clamp: float | None):
        super().__init__()
        self.conv = ModulatedConv(in_channels, image_channels, w_dim, kernel_size=1, up=False, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(image_channels))
        self.clamp = clamp

    def forward(self, x_BIHW: Tensor, w_BD: Tensor) -> Tensor:
        out = self.conv(x_BIHW, w_BD) + self.bias.to(x_BIHW.dtype)[:, None, None]
        return (out if self.clamp is None else out.clamp(-self.clamp, self.clamp)).float()


class SynthesisBlock(nn.Module):
    """All layers of one resolution: `up` (absent at the constant), `conv`, `to_rgb`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        w_dim: int,
        *,
        size: tuple[int, int],
        clamp: float | None,
        image_channels: int,
        first: bool,
    ):
        super().__init__()
        self.up = None
        if not first:
            self.up = StyleLayer(in_channels, channels, w_dim, up=True, size=size, clamp=clamp)
        self.conv = StyleLayer(channels, channels, w_dim, up=False, size=size, clamp=clamp)
        self.to_rgb = ToRGB(channels, image_channels, w_dim, clamp=clamp)

    def style_layers(self) -> Iterator[StyleLayer]:
        """The layers that yield a feature map, in order."""
        if self.up is not None:
            yield self.up
        yield self.conv


class StyleGAN2(Generator):
    """StyleGAN2 generator, skip architecture.

    Args:
        channels: channels per resolution, from the constant upwards; its length fixes the image size.
        constant_size: height and width of the learned constant, (4, 4) for square images.
        z_dim: size of z.
        w_dim: size of w.
        mapping_layers: depth of the mapping network.
        mapping_lr_multiplier: learning-rate multiplier of the mapping network; scales its weights and biases.
        conv_clamp: clamp of every layer's output, None for none.
        image_channels: channels of the image.

    Raises:
        ValueError: a size that cannot be built.
    """

    family = "stylegan2"

    def __init__(
        self,
        *,
        channels: Sequence[int],
        constant_size: Sequence[int] = (4, 4),
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        mapping_lr_multiplier: float = 0.01,
        conv_clamp: float | None = None,
        image_channels: int = 3,
    ):
        super().__init__()
        sizes = (*channels, *constant_size, z_dim, w_dim, mapping_layers, image_channels)
        if len(channels) < 1 or len(constant_size) != 2 or min(sizes) < 1:
            raise ValueError(
                f"channels={list(channels)}, constant_size={list(constant_size)}, z_dim={z_dim}, w_dim={w_dim}, "
                f"mapping_layers={mapping_layers}, image_channels={image_channels} describe no generator; "
                "every size must be a positive integer and constant_size a (height, width) pair"
            )
        self.channels = tuple(channels)
        self.constant_size = (constant_size[0], constant_size[1])
        self._z_dim, self._w_dim = z_dim, w_dim
        self.mapping_lr_multiplier = mapping_lr_multiplier
        self.conv_clamp = conv_clamp
        self.image_channels = image_channels

        self.mapping_network = nn.ModuleList(
            EqualizedLinear(z_dim if i == 0 else w_dim, w_dim, lr_multiplier=mapping_lr_multiplier)
            for i in range(mapping_layers)
        )
        self.constant = nn.Parameter(torch.randn(channels[0], *self.constant_size))
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                channels[max(i - 1, 0)],
                channels[i],
                w_dim,
                size=(self.constant_size[0] << i, self.constant_size[1] << i),
                clamp=conv_clamp,
                image_channels=image_channels,
                first=i == 0,
            )
            for i in range(len(channels))
        )
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("kernel", fir_kernel(gain=4.0), persistent=False)

    @property
    def resolution(self) -> tuple[int, int]:
        scale = len(self.channels) - 1
        return self.constant_size[0] << scale, self.constant_size[1] << scale

    @property
    def num_ws(self) -> int:
        return 2 * len(self.channels)

    @property
    def z_dim(self) -> int:
        return self._z_dim

    @property
    def w_dim(self) -> int:
        return self._w_dim

    @property
    def feature_channels(self) -> tuple[int, ...]:
        first, *rest = self.channels
        return (first, first, *(c for channels in rest for c in (channels, channels)))

    @property
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple(layer.size for layer in self._style_layers())

    def config(self) -> dict[str, Any]:
        return {
            "channels": list(self.channels),
            "constant_size": list(self.constant_size),
            "z_dim": self.z_dim,
            "w_dim": self.w_dim,
            "mapping_layers": len(self.mapping_network),
            "mapping_lr_multiplier": self.mapping_lr_multiplier,
            "conv_clamp": self.conv_clamp,
            "image_channels": self.image_channels,
        }

    def mapping(self, z_BD: Tensor, label: Tensor | None = None) -> Tensor:
        if label is not None:
            raise ValueError("a label was given to an unconditional generator; call mapping(z) without one")
        x = z_BD * (z_BD.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()
        for layer in self.mapping_network:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE) * LEAKY_GAIN
        return x

    def synthesis(self, w_plus_BLD: Tensor, noise: Noise = "const", *, dtype: torch.dtype | None = None) -> Synthesis:
        if w_plus_BLD.ndim != 3 or w_plus_BLD.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(
                f"w_plus has shape {list(w_plus_BLD.shape)}, this generator takes [B, {self.num_ws}, {self.w_dim}]; "
                "use truncate(w) to broadcast a single w"
            )
        ws = w_plus_BLD.unbind(1)
        maps = self._noise_maps(noise)
        x = self.constant.to(dtype or self.constant.dtype).expand(len(w_plus_BLD), -1, -1, -1)
        features = [x]
        image: Tensor | None = None
        # Style inputs: the first layer takes 0; a ToRGB shares the index of the next resolution's first layer.
        index = 0
        for block in self.blocks:
            assert isinstance(block, SynthesisBlock)
            for layer in block.style_layers():
                x = layer(x, ws[index], maps[index])
                features.append(x)
                index += 1
            rgb = block.to_rgb(x, ws[index])
            image = rgb if image is None else upsample(image, self.get_buffer("kernel")) + rgb
        assert image is not None
        return Synthesis(image, FeaturePyramid(tuple(features)))

    def _style_layers(self) -> Iterator[StyleLayer]:
        for block in self.blocks:
            assert isinstance(block, SynthesisBlock)
            yield from block.style_layers()

    def _noise_maps(self, noise: Noise) -> Sequence[Tensor | None]:
        layers = list(self._style_layers())
        if noise == "const":
            return [layer.get_buffer("noise_const") for layer in layers]
        if noise == "none":
            return [None] * len(layers)
        if isinstance(noise, str) or [tuple(n.shape[2:]) for n in noise] != [layer.size for layer in layers]:
            came = noise if isinstance(noise, str) else [list(n.shape) for n in noise]
            raise ValueError(
                f"noise={came} fits none of this generator's layers; pass 'const', 'none' or one [1 or B, 1, h, w] "
                f"tensor for each of the sizes {list(self.noise_shapes)}"
            )
        return list(noise)
