"""Building blocks of the style-based generators in plain PyTorch operations: nothing is compiled at first use.

From the papers' text: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below), StyleGAN (Karras et al., CVPR 2019; "SG1").
Knows one layer at a time. Does not know how layers make a generator.

Shape letters: B batch, I input channels, O output channels, H W map size, D latent size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.generators.base import Noise

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)
LEAKY_SLOPE = 0.2
LEAKY_GAIN = math.sqrt(2.0)  # keeps unit variance through a leaky ReLU
EPSILON = 1e-8


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Normal random numbers; on the meta device, where only shapes are checked, nothing is drawn."""
    values = torch.empty(*shape)
    return values if values.is_meta else values.normal_(std=std)


def fir_kernel(gain: float = 1.0) -> Tensor:
    """Separable low-pass filter [1, 3, 3, 1] that follows every zero-insertion (SG2, appendix B); sums to `gain`."""
    scale = gain / sum(FIR_TAPS) ** 2
    return torch.tensor([[scale * a * b for b in FIR_TAPS] for a in FIR_TAPS])


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


def normalize(x_BC: Tensor) -> Tensor:
    """Every row scaled to a mean square of 1 (SG1, appendix C: what enters the mapping network)."""
    return x_BC * (x_BC.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def activate(x_BCHW: Tensor, bias_C: Tensor, clamp: float | None) -> Tensor:
    """Bias, leaky ReLU with unit-variance gain, optional clamp."""
    shape = [1, -1] + [1] * (x_BCHW.ndim - 2)
    out = F.leaky_relu(x_BCHW + bias_C.to(x_BCHW.dtype).view(shape), LEAKY_SLOPE).mul(LEAKY_GAIN)
    return out if clamp is None else out.clamp(-clamp, clamp)


def choose_noise(noise: Noise, stored: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The noise map of each layer: stored ones [1, 1, h, w], none, or those of the caller, whose sizes are checked."""
    if noise == "const":
        return stored
    if noise == "none":
        return [None] * len(stored)
    sizes = [list(n.shape[2:]) for n in stored]
    if isinstance(noise, str) or [list(n.shape[2:]) for n in noise] != sizes:
        came = noise if isinstance(noise, str) else [list(n.shape) for n in noise]
        raise ValueError(
            f"noise={came} fits none of this generator's layers; pass 'const', 'none' or one [1 or B, 1, h, w] "
            f"tensor for each of the sizes {sizes}"
        )
    return list(noise)


class EqualizedLinear(nn.Module):
    """Linear layer with run-time weight scale gain/sqrt(fan_in), "equalized learning rate" (SG1, appendix C)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
        gain: float = 1.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(normal(out_features, in_features, std=1.0 / lr_multiplier))
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        self.weight_gain = gain * lr_multiplier / math.sqrt(in_features)
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
        self.weight = nn.Parameter(normal(out_channels, in_channels, kernel_size, kernel_size))
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
        elif weight_OIkk.shape[-1] == 1:
            # As a matrix product: oneDNN's 1x1 convolution to 3 channels rounds differently for one and two threads,
            # and a DataLoader worker has one.
            out = (weight_OIkk[:, :, 0, 0].to(x_BIHW.dtype) @ x_BIHW.flatten(2)).unflatten(2, x_BIHW.shape[2:])
        else:
            out = F.conv2d(x_BIHW, weight_OIkk.to(x_BIHW.dtype), padding=1)
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
        gain: float = 1.0,
    ):
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, w_dim, kernel_size=3, up=up, demodulate=True)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.clamp = clamp
        self.gain = gain
        self.size = size
        self.register_buffer("noise_const", normal(1, 1, *size))

    def forward(self, x_BIHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
        out = self.conv(x_BIHW, w_BD)
        if noise is not None:
            out = out + (noise * self.noise_strength).to(out.dtype)
        out = activate(out, self.bias, self.clamp)
        return out if self.gain == 1.0 else out * self.gain


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


class ResidualProjection(nn.Module):
    """Around a resolution: 1x1 convolution, then filtered 2x up-sampling (SG2, figure 7c); no bias."""

    def __init__(self, in_channels: int, out_channels: int, *, gain: float):
        super().__init__()
        self.weight = nn.Parameter(normal(out_channels, in_channels, 1, 1))
        self.weight_gain = gain / math.sqrt(in_channels)
        self.register_buffer("kernel", fir_kernel(gain=4.0), persistent=False)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        return upsample(F.conv2d(x_BIHW, (self.weight * self.weight_gain).to(x_BIHW.dtype)), self.get_buffer("kernel"))
