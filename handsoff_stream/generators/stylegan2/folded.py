"""StyleGAN2's synthesis network with its weights prepared for one precision; `StyleGAN2.fold` makes it.

What depends on the weights alone is computed once: run-time scales, the gain of the activation, the sums of squares of
demodulation, rounding, memory layout. Every layer is then one dense convolution for the whole batch between one pass
over its input and three over its output, channels-last. Nothing here reads a value on the host and no shape depends on
one, so a CUDA graph can hold the whole network.

Images are summed up in float32 in every precision. float16, whose largest number is 65504, cannot overflow inside a
convolution: its weights are divided by their largest magnitude times sqrt(fan_in), its styles by their largest
magnitude, so that a sum over fan_in products of inputs of at most c is at most c * sqrt(fan_in), 17400 for c = 256 and
512 channels; what was divided out returns with the demodulation, a float32 number per channel. c is the clamp with
which the network was trained, or FLOAT16_CLAMP.

Knows one pass of the network. Does not know parameters, training or file formats.

From the paper's text: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below). Shape letters: B batch, I input channels, O
output channels, K image channels, H W map size, D latent size, L number of style inputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators.base import Noise, Synthesis
from handsoff_stream.generators.layers import LEAKY_SLOPE, choose_noise, filter_fir, upsample

TINY = 1e-30  # keeps 0 / 0 out of a layer whose weights or styles are all zero


@dataclass(frozen=True, eq=False)
class FoldedStyleLayer:
    """Modulated 3x3 convolution, noise, bias, activation: input map [B, I, h, w] => feature map [B, O, H, W].

    Scaling the activations instead of the weights is the same product and lets a whole batch share one convolution:
    conv(x, W * s) * d == conv(x * s, W) * d, with d = rsqrt(sum (W * s)^2 + eps) (SG2, equations 1-3). A gain after the
    leaky ReLU is the same gain before it: it is part of d, bias and noise.
    """

    affine: tuple[Tensor, Tensor]
    """Weight [I, D] and bias [I] of w => style, float32."""
    weight: Tensor
    """[O, I, 3, 3], or [I, O, 3, 3] for a layer that up-samples, in the dtype of the convolution."""
    energy_IO: Tensor
    """float32: W^2 summed over the kernel, divided by the squared gain."""
    epsilon: float
    """Divided likewise."""
    unit_O: Tensor | None
    """float32: what `weight` was divided by; None for a dtype whose range needs no care."""
    kernel: Tensor | None
    """FIR kernel [4, 4] of a layer that up-samples."""
    bias_O: Tensor
    """float32, times gain."""
    noise_strength: Tensor
    """float32 [], times gain."""
    clamp: float | None

    def __call__(self, x_BIHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
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
        """Scale of every input channel, and of every output channel, in the dtype of the convolution."""
        dtype = self.weight.dtype
        style_BI = F.linear(w_BD, *self.affine)
        demodulation_BO = (style_BI.square() @ self.energy_IO + self.epsilon).rsqrt()
        if self.unit_O is not None:
            peak_B1 = style_BI.detach().abs().amax(dim=1, keepdim=True)
            style_BI = style_BI / peak_B1.clamp(min=TINY)
            demodulation_BO = (demodulation_BO * peak_B1 * self.unit_O).clamp(max=torch.finfo(dtype).max)
        return style_BI.to(dtype), demodulation_BO.to(dtype)

    def _shift(self, noise: Tensor | None) -> Tensor:
        """Bias and noise, [1, O, 1, 1] or [1 or B, O, H, W], channels-last."""
        shift_BHWO = self.bias_O.to(self.weight.dtype)[None, None, None]
        if noise is not None:
            shift_BHWO = (noise.permute(0, 2, 3, 1) * self.noise_strength).to(shift_BHWO.dtype) + shift_BHWO
        return shift_BHWO.permute(0, 3, 1, 2)


def _reused(operand: Tensor) -> Tensor | None:
    """Where a result goes: over its operand, for fresh memory costs a CPU more than the pass; autograd may need it."""
    return None if operand.requires_grad else operand


@dataclass(frozen=True, eq=False)
class FoldedToRGB:
    """1x1 modulated convolution without demodulation, to image channels, float32 [B, K, H, W].

    Its weights, which are few, are modulated. It is a matrix product because oneDNN's 1x1 convolution to 3 channels
    rounds differently for one and two threads, and a DataLoader worker has one.
    """

    affine: tuple[Tensor, Tensor]
    weight_KI: Tensor
    bias_K: Tensor
    clamp: float | None

    def __call__(self, x_BIHW: Tensor, w_BD: Tensor) -> Tensor:
        weight_BKI = self.weight_KI * F.linear(w_BD, *self.affine)[:, None]
        rgb = (weight_BKI.to(x_BIHW.dtype) @ x_BIHW.flatten(2)).float() + self.bias_K[:, None]
        return (rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)).unflatten(2, x_BIHW.shape[2:])


@dataclass(frozen=True, eq=False)
class FoldedBlock:
    """All layers of one resolution."""

    style_layers: tuple[FoldedStyleLayer, ...]
    skip_OI11: Tensor | None
    """Weight of the projection around the block, which 2x up-sampling follows."""
    to_rgb: FoldedToRGB | None


@dataclass(frozen=True, eq=False)
class FoldedSynthesis:
    """w+ => image and feature maps; arguments, result and errors are those of `Generator.synthesis`."""

    constant: Tensor
    """float32 [1, C, h, w], channels-last."""
    blocks: tuple[FoldedBlock, ...]
    noise_const: tuple[Tensor, ...]
    """The stored maps, float32 [1, 1, H, W] of each style layer."""
    w_dim: int

    def __call__(self, w_plus_BLD: Tensor, noise: Noise = "const") -> Synthesis:
        num_ws = len(self.noise_const) + 1
        if w_plus_BLD.ndim != 3 or w_plus_BLD.shape[1:] != (num_ws, self.w_dim):
            raise ValueError(
                f"w_plus has shape {list(w_plus_BLD.shape)}, this generator takes [B, {num_ws}, {self.w_dim}]; "
                "use truncate(w) to broadcast a single w"
            )
        ws, maps = w_plus_BLD.unbind(1), choose_noise(noise, self.noise_const)
        x = self.constant.expand(len(w_plus_BLD), -1, -1, -1)
        features = [x]
        image: Tensor | None = None
        # Style inputs: the first layer takes 0; a ToRGB shares the index of the next resolution's first layer.
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
