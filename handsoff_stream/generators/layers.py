"""Operations that the style-based generators share, in plain PyTorch: nothing is compiled at first use.

Written from the papers: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below), StyleGAN (Karras et al., CVPR 2019; "SG1").
Knows single operations. Does not know modulated layers, nor how layers make a generator.

Shape letters: B batch, C channels, H W map size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.generators.base import Noise

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)
LEAKY_SLOPE = 0.2
LEAKY_GAIN = math.sqrt(2.0)
"""Gain that keeps the variance through a leaky ReLU."""
EPSILON = 1e-8


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """A float32 tensor of normal random numbers; on the meta device, which only has shapes, nothing is drawn."""
    values = torch.empty(*shape)
    return values if values.is_meta else values.normal_(std=std)


def fir_kernel(gain: float = 1.0) -> Tensor:
    """The separable low-pass filter [1, 3, 3, 1], float32 [4, 4], whose sum is `gain` (SG2, appendix B)."""
    scale = gain / sum(FIR_TAPS) ** 2
    return torch.tensor([[scale * a * b for b in FIR_TAPS] for a in FIR_TAPS])


def filter_fir(x_BCHW: Tensor, kernel: Tensor, pad: tuple[int, int], stride: int = 1) -> Tensor:
    """Filter every channel with the same FIR kernel [k, k].

    Args:
        x_BCHW: floating point.
        kernel: of any floating-point dtype.
        pad: zeros before and after, on both axes.
        stride: of the result, on both axes.
    """
    channels = x_BCHW.shape[1]
    weight = kernel.to(x_BCHW.dtype).expand(channels, 1, -1, -1)
    if pad[0] != pad[1]:
        return F.conv2d(F.pad(x_BCHW, (*pad, *pad)), weight, stride=stride, groups=channels)
    return F.conv2d(x_BCHW, weight, padding=pad[0], stride=stride, groups=channels)


def upsample(x_BCHW: Tensor) -> Tensor:
    """Upsample by 2: insert zeros, then filter with [1, 3, 3, 1] and gain 4 (SG2, appendix B); [B, C, 2 H, 2 W].

    Every output is 3/4 of the nearer and 1/4 of the farther input along each axis, which is bilinear interpolation of
    the input framed by zeros.
    """
    framed = F.pad(x_BCHW, (1, 1, 1, 1))
    return F.interpolate(framed, scale_factor=2, mode="bilinear", align_corners=False)[:, :, 2:-2, 2:-2]


def normalize(x_BC: Tensor) -> Tensor:
    """Scale every row to a mean square of 1, as the inputs of the mapping network are (SG1, appendix C)."""
    return x_BC * (x_BC.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def activate(x_BCHW: Tensor, bias_C: Tensor, clamp: float | None) -> Tensor:
    """Bias, leaky ReLU, gain `LEAKY_GAIN`, and a clamp to [-clamp, clamp] unless `clamp` is None."""
    shape = [1, -1] + [1] * (x_BCHW.ndim - 2)
    out = F.leaky_relu(x_BCHW + bias_C.to(x_BCHW.dtype).view(shape), LEAKY_SLOPE).mul(LEAKY_GAIN)
    return out if clamp is None else out.clamp(-clamp, clamp)


def choose_noise(noise: Noise, stored: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The noise map of each layer, or None for a layer without noise.

    Args:
        noise: see `Generator.synthesis`.
        stored: the maps for "const", float32 [1, 1, h, w] of each layer.

    Raises:
        ValueError: an unknown word, or maps of other sizes than the stored ones.
    """
    if noise == "const":
        return stored
    if noise == "none":
        return [None] * len(stored)
    sizes = [list(n.shape[2:]) for n in stored]
    if isinstance(noise, str) or [list(n.shape[2:]) for n in noise] != sizes:
        came = noise if isinstance(noise, str) else [list(n.shape) for n in noise]
        raise ValueError(
            f"noise={came} does not fit the layers of this generator; pass 'const', 'none', or one [1 or B, 1, h, w] "
            f"tensor for each of the sizes {sizes}"
        )
    return list(noise)


class EqualizedLinear(nn.Module):
    """Linear layer whose weight is scaled by gain / sqrt(fan_in) at run time ("equalized learning rate").

    See SG1, appendix C.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias_init: initial value of every bias.
        lr_multiplier: factor of the learning rate, which also scales weight and bias at run time.
        gain: factor of the weight.
    """

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

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [O, I] and bias [O] with the run-time scales applied."""
        return self.weight * self.weight_gain, self.bias * self.bias_gain

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] => [B, out_features]."""
        return F.linear(x, *self.fold())
