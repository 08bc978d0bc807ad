"""The layers of StyleGAN2's synthesis network: their parameters, and `fold`, which prepares them for one dtype.

Folding is differentiable in the parameters: training folds at every step, inference once. Written from the paper:
StyleGAN2 (Karras et al., CVPR 2020; "SG2" below). Knows parameters and run-time scales. Does not know how layers make a
network, nor the arithmetic of a folded layer.

Shape letters: I input channels, O output channels, K image channels, k kernel size, D latent size.
"""

import math

import torch
from torch import Tensor, nn

from handsoff_stream.generators.layers import EPSILON, LEAKY_GAIN, EqualizedLinear, fir_kernel, normal
from handsoff_stream.generators.stylegan2.folded import TINY, FoldedStyleLayer, FoldedToRGB

FLOAT16_CLAMP = 256.0
"""Largest magnitude of outputs in float16, for networks trained without a clamp; others are trained with this clamp."""


class ModulatedConv(nn.Module):
    """Parameters of a convolution whose weights are scaled by a style, an affine map of w (SG2, equations 1-3)."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(normal(out_channels, in_channels, kernel_size, kernel_size))
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight_gain = 1.0 / math.sqrt(in_channels * kernel_size**2)


class StyleLayer(nn.Module):
    """Modulated 3x3 convolution, scaled noise, bias, activation (SG2, figure 2c). Its output is a feature map.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the feature map.
        w_dim: size of w.
        up: whether the layer upsamples by 2.
        size: (H, W) of the feature map.
        clamp: largest magnitude of the output, before `gain`; None: no clamp.
        gain: factor of the output.
    """

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
        self.conv = ModulatedConv(in_channels, out_channels, w_dim, kernel_size=3)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.clamp = clamp
        self.gain = gain
        self.size = size
        self.up = up
        self.register_buffer("noise_const", normal(1, 1, *size))
        self.register_buffer("kernel", fir_kernel(gain=4.0), persistent=False)

    def fold(self, dtype: torch.dtype) -> FoldedStyleLayer:
        """The layer with its convolution in `dtype`; differentiable in the parameters."""
        weight = self.conv.weight * self.conv.weight_gain
        gain = LEAKY_GAIN * self.gain
        energy_IO = weight.square().sum(dim=(2, 3)).T / gain**2
        clamp = None if self.clamp is None else self.clamp * self.gain
        unit_O = None
        if dtype == torch.float16:
            unit_O = weight.detach().abs().amax(dim=(1, 2, 3)) * math.sqrt(weight[0].numel())
            weight = weight / unit_O.clamp(min=TINY)[:, None, None, None]
            clamp = min(clamp or FLOAT16_CLAMP, FLOAT16_CLAMP)
        if self.up:
            weight = weight.transpose(0, 1)
        return FoldedStyleLayer(
            affine=self.conv.affine.fold(),
            weight=weight.to(dtype).contiguous(memory_format=torch.channels_last),
            energy_IO=energy_IO,
            epsilon=EPSILON / gain**2,
            unit_O=unit_O,
            kernel=self.get_buffer("kernel").to(dtype) if self.up else None,
            bias_O=self.bias * gain,
            noise_strength=self.noise_strength * gain,
            clamp=clamp,
        )


class ToRGB(nn.Module):
    """1x1 modulated convolution without demodulation, to image channels; its output is added to the image.

    See SG2, figure 7b.
    """

    def __init__(self, in_channels: int, image_channels: int, w_dim: int, *, clamp: float | None):
        super().__init__()
        self.conv = ModulatedConv(in_channels, image_channels, w_dim, kernel_size=1)
        self.bias = nn.Parameter(torch.zeros(image_channels))
        self.clamp = clamp

    def fold(self) -> FoldedToRGB:
        """The layer, which computes in the dtype of its input."""
        weight_KI = self.conv.weight[:, :, 0, 0] * self.conv.weight_gain
        return FoldedToRGB(self.conv.affine.fold(), weight_KI, self.bias, self.clamp)


class ResidualProjection(nn.Module):
    """The path around a block: 1x1 convolution without bias, then an upsampling by 2 (SG2, figure 7c)."""

    def __init__(self, in_channels: int, out_channels: int, *, gain: float):
        super().__init__()
        self.weight = nn.Parameter(normal(out_channels, in_channels, 1, 1))
        self.weight_gain = gain / math.sqrt(in_channels)

    def fold(self, dtype: torch.dtype) -> Tensor:
        """Weight [O, I, 1, 1] in `dtype`, with the run-time scale applied."""
        return (self.weight * self.weight_gain).to(dtype)
