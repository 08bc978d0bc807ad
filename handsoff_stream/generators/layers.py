"""What the style-based generators are built of, in plain PyTorch operations: nothing is compiled at first use.

From the papers' text: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below), StyleGAN (Karras et al., CVPR 2019; "SG1").
Knows one operation at a time. Does not know modulated layers, nor how layers make a generator.

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


def upsample(x_BCHW: Tensor) -> Tensor:
    """Filtered 2x up-sampling: zero-insertion, then [1, 3, 3, 1] with gain 4 (SG2, appendix B).

    A zero-inserted signal meets the taps 3/4 and 1/4 alternately: bilinear interpolation in a frame of zeros.
    """
    framed = F.pad(x_BCHW, (1, 1, 1, 1))
    return F.interpolate(framed, scale_factor=2, mode="bilinear", align_corners=False)[:, :, 2:-2, 2:-2]


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

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the same layer without run-time scales."""
        return self.weight * self.weight_gain, self.bias * self.bias_gain

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.fold())
