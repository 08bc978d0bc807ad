"""StyleGAN2's synthesis network with weights that are prepared for one dtype; `StyleGAN2.fold` makes it.

What depends on the weights alone is computed once: run-time scales, the gain of the activation, the sums of squares for
demodulation, rounding, and memory layout. A layer is then one dense convolution for the whole batch, with one pass over
its input before and three passes over its output after, channels-last. Nothing reads a value of a tensor on the host
and no shape depends on one, so the whole network can be captured in a CUDA graph.

Images are accumulated in float32 in every precision. In float16, whose largest number is 65504, a convolution cannot
overflow: its weights are divided by their largest magnitude times sqrt(fan_in), and its styles by their largest
magnitude. A sum over fan_in products with inputs of at most c is then at most c * sqrt(fan_in), which is 17400 for
c = 256 and 512 channels. The demodulation, a float32 number per channel, multiplies by what was divided out. c is the
clamp that the network was trained with, or FLOAT16_CLAMP.

Knows one pass of the network. Does not know parameters, training or file formats.

Written from the paper: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below).

Shape letters: B batch, I input channels, O output channels, K image channels, h w and H W sizes of the input and output
map of a layer, D latent size, L number of style inputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators.base import Noise, Synthesis
from handsoff_stream.generators.layers import LEAKY_SLOPE, choose_noise, filter_fir, upsample

TINY = 1e-30
"""Smallest divisor; it avoids 0 / 0 in a layer whose weights or styles are all zero."""


@dataclass(frozen=True, eq=False)
class FoldedStyleLayer:
    """Modulated 3x3 convolution, noise, bias, activation: input map [B, I, h, w] => feature map [B, O, H, W].

    The activations are scaled instead of the weights. The product is the same, and the whole batch shares one
    convolution: conv(x, W * s) * d == conv(x * s, W) * d with d = rsqrt(sum (W * s)^2 + eps) (SG2, equations 1-3). The
    gain after the leaky ReLU equals the same gain before it, so it is part of d, bias and noise.
    """

    affine: tuple[Tensor, Tensor]
    """Weight [I, D] and bias [I] of the map from w to the style, float32."""
    weight: Tensor
    """[O, I, 3, 3], or [I, O, 3, 3] for a layer that upsamples, in the dtype of the convolution."""
    energy_IO: Tensor
    """The squared weights summed over the kernel, divided by the squared gain; float32."""
    epsilon: float
    """The eps of the demodulation, divided by the squared gain."""
    unit_O: Tensor | None
    """What `weight` was divided by, float32; None for a dtype that cannot overflow."""
    kernel: Tensor | None
    """FIR kernel [4, 4] of a layer that upsamples; None for other layers."""
    bias_O: Tensor
    """float32, multiplied by the gain."""
    noise_strength: Tensor
    """float32 [], multiplied by the gain."""
    clamp: float | None
    """Largest magnitude of the output, multiplied by the gain; None: no clamp."""

    def __call__(self, x_BIHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
        """The feature map [B, O, H, W]; `noise`: float32 [1 or B, 1, H, W], or None for no noise."""
        style_BI, demodulation_BO = self._modulation(w_BD)
        x_BIHW = x_BIHW.to(self.weight.dtype) * style_BI[:, :, None, None]
        if self.kernel is None:
            out_BOHW = F.conv2d(x_BIHW, self.weight, padding=1)
        else:
            out_BOHW = filter_fir(F.conv_transpose2d(x_BIHW, self.weight, stride=2), self.kernel, pad=(1, 1))
        out_BOHW = torch.mul(out_BOHW, demodulation_BO[:, :, None, None], out=_reused(out_BOHW))
        out_BOHW = F.leaky_relu_(out_BOHW.add_(self._shift(noise)), LEAKY_SLOPE)
        if self.clamp is None:
            return out_BOHW
        return torch.clamp(out_BOHW, -self.clamp, self.clamp, out=_reused(out_BOHW))

    def _modulation(self, w_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of the input channels and of the output channels, in the dtype of the convolution."""
        dtype = self.weight.dtype
        style_BI = F.linear(w_BD, *self.affine)
        demodulation_BO = (style_BI.square() @ self.energy_IO + self.epsilon).rsqrt()
        if self.unit_O is not None:
            peak_B1 = style_BI.detach().abs().amax(dim=1, keepdim=True)
            style_BI = style_BI / peak_B1.clamp(min=TINY)
            demodulation_BO = (demodulation_BO * peak_B1 * self.unit_O).clamp(max=torch.finfo(dtype).max)
        return style_BI.to(dtype), demodulation_BO.to(dtype)

    def _shift(self, noise: Tensor | None) -> Tensor:
        """Bias plus noise, [1, O, 1, 1] or [1 or B, O, H, W], channels-last."""
        shift_BHWO = self.bias_O.to(self.weight.dtype)[None, None, None]
        if noise is not None:
            shift_BHWO = (noise.permute(0, 2, 3, 1) * self.noise_strength).to(shift_BHWO.dtype) + shift_BHWO
        return shift_BHWO.permute(0, 3, 1, 2)


def _reused(operand: Tensor) -> Tensor | None:
    """The `out=` of an operation: its operand, because on a CPU new memory costs more than the operation itself.

    None, which means new memory, if autograd may need the operand.
    """
    return None if operand.requires_grad else operand


@dataclass(frozen=True, eq=False)
class FoldedToRGB:
    """1x1 modulated convolution without demodulation, to image channels.

    The weights are modulated, because they are few. It is a matrix product, because oneDNN's 1x1 convolution to 3
    channels rounds differently with one and with two threads, and a DataLoader worker has one.
    """

    affine: tuple[Tensor, Tensor]
    """Weight [I, D] and bias [I] of the map from w to the style, float32."""
    weight_KI: Tensor
    bias_K: Tensor
    clamp: float | None
    """Largest magnitude of the output; None: no clamp."""

    def __call__(self, x_BIHW: Tensor, w_BD: Tensor) -> Tensor:
        """The contribution to the image, float32 [B, K, H, W]."""
        weight_BKI = self.weight_KI * F.linear(w_BD, *self.affine)[:, None]
        rgb = (weight_BKI.to(x_BIHW.dtype) @ x_BIHW.flatten(2)).float() + self.bias_K[:, None]
        return (rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)).unflatten(2, x_BIHW.shape[2:])


@dataclass(frozen=True, eq=False)
class FoldedBlock:
    """The layers of one resolution."""

    style_layers: tuple[FoldedStyleLayer, ...]
    skip_OI11: Tensor | None
    """Weight of the projection around the block, which an upsampling by 2 follows; None: no projection."""
    to_rgb: FoldedToRGB | None
    """None: this resolution does not contribute to the image."""


@dataclass(frozen=True, eq=False)
class FoldedSynthesis:
    """The synthesis network: w+ => image and feature maps."""

    constant: Tensor
    """The learned constant, float32 [1, C, h, w], channels-last."""
    blocks: tuple[FoldedBlock, ...]
    noise_const: tuple[Tensor, ...]
    """The stored noise map of each style layer, float32 [1, 1, H, W]."""
    w_dim: int

    def __call__(self, w_plus_BLD: Tensor, noise: Noise = "const") -> Synthesis:
        """Arguments and result are those of `Generator.synthesis`.

        Raises:
            ValueError: as `Generator.synthesis`.
        """
        num_ws = len(self.noise_const) + 1
        if w_plus_BLD.ndim != 3 or w_plus_BLD.shape[1:] != (num_ws, self.w_dim):
            raise ValueError(
                f"w_plus has shape {list(w_plus_BLD.shape)}, but this generator takes [B, {num_ws}, {self.w_dim}]; use "
                "truncate(w) to repeat a single w"
            )
        ws, maps = w_plus_BLD.unbind(1), choose_noise(noise, self.noise_const)
        x = self.constant.expand(len(w_plus_BLD), -1, -1, -1)
        features = [x]
        image: Tensor | None = None
        # The style layers take the style inputs in order; a ToRGB takes the one of the next resolution's first layer.
        index = 0
        for block in self.blocks:
            block_input = x
            for layer in block.style_layers:
                x = layer(x, ws[index], maps[index])
                features.append(x)
                index += 1
            if block.skip_OI11 is not None:
                x = upsample(F.conv2d(block_input.to(x.dtype), block.skip_OI11)) + x
            if block.to_rgb is not None:
                rgb = block.to_rgb(x, ws[index])
                image = rgb if image is None else upsample(image) + rgb
        assert image is not None
        return Synthesis(image, FeaturePyramid(tuple(features)))
