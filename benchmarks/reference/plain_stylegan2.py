"""StyleGAN2's synthesis as the paper states it, step by step: the reference for the folded network.

Weights are modulated and demodulated for each sample and applied as a grouped convolution; upsampling inserts zeros and
filters; noise, bias, activation, gain and clamp are separate operations (Karras et al., CVPR 2020, sections 2 and 3.1,
appendix B). Reads the parameters of a `StyleGAN2`. Slow, differentiable, in the dtype of the weights.

Shape letters: B batch, I input channels, O output channels, H W map size, D latent size, L number of style inputs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators import StyleGAN2, Synthesis
from handsoff_stream.generators.stylegan2.style_layers import ModulatedConv, StyleLayer, ToRGB


def plain_synthesis(generator: StyleGAN2, w_plus_BLD: Tensor, noise: Sequence[Tensor | None]) -> Synthesis:
    """Image and feature maps of w+.

    Args:
        generator: its parameters are read.
        w_plus_BLD: float [B, num_ws, w_dim].
        noise: one map [1 or B, 1, H, W] per style layer, or None for no noise in that layer.
    """
    x = generator.constant.expand(len(w_plus_BLD), -1, -1, -1)
    features, image, index = [x], None, 0
    for block in generator.blocks:
        block_input = x
        for layer in block.style_layers():  # type: ignore[operator]
            x = style_layer(layer, x, w_plus_BLD[:, index], noise[index])
            features.append(x)
            index += 1
        if block.skip is not None:
            projection: Tensor = block.skip.weight * block.skip.weight_gain  # type: ignore[union-attr,operator]
            x = x + filtered(zero_inserted(F.conv2d(block_input, projection)), pad=(2, 1))
        if block.to_rgb is not None:
            rgb = to_rgb(block.to_rgb, x, w_plus_BLD[:, index])  # type: ignore[arg-type]
            image = rgb if image is None else filtered(zero_inserted(image), pad=(2, 1)) + rgb
    assert image is not None
    return Synthesis(image, FeaturePyramid(tuple(features)))


def style_layer(layer: StyleLayer, x_BIHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
    """Modulated convolution, noise, bias, leaky ReLU, clamp, gain: [B, O, H, W], or twice as high and wide."""
    out = modulated_convolution(layer.conv, x_BIHW, w_BD, up=layer.up, demodulate=True)
    if noise is not None:
        out = out + noise * layer.noise_strength
    out = out + layer.bias[:, None, None]
    out = F.leaky_relu(out, 0.2) * math.sqrt(2.0)
    if layer.clamp is not None:
        out = out.clamp(-layer.clamp, layer.clamp)
    return out * layer.gain


def to_rgb(layer: ToRGB, x_BIHW: Tensor, w_BD: Tensor) -> Tensor:
    """The contribution of one resolution to the image, [B, image channels, H, W]."""
    out = modulated_convolution(layer.conv, x_BIHW, w_BD, up=False, demodulate=False) + layer.bias[:, None, None]
    return out if layer.clamp is None else out.clamp(-layer.clamp, layer.clamp)


def modulated_convolution(conv: ModulatedConv, x_BIHW: Tensor, w_BD: Tensor, *, up: bool, demodulate: bool) -> Tensor:
    """A convolution whose weights differ between samples, with one group per sample (equations 1 to 3 of the paper)."""
    style_BI = F.linear(w_BD, conv.affine.weight * conv.affine.weight_gain, conv.affine.bias)
    weight_BOIkk = conv.weight * conv.weight_gain * style_BI[:, None, :, None, None]
    if demodulate:
        weight_BOIkk = weight_BOIkk * (weight_BOIkk.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    samples, _, height, width = x_BIHW.shape
    x_1XHW = x_BIHW.reshape(1, -1, height, width)
    if up:
        weight_XOkk = weight_BOIkk.transpose(1, 2).flatten(0, 1)
        out = filtered(F.conv_transpose2d(x_1XHW, weight_XOkk, stride=2, groups=samples), pad=(1, 1))
    else:
        out = F.conv2d(x_1XHW, weight_BOIkk.flatten(0, 1), padding=conv.weight.shape[2] // 2, groups=samples)
    return out.reshape(samples, -1, *out.shape[2:])


def zero_inserted(x_BCHW: Tensor) -> Tensor:
    """A zero after every pixel, on both axes: [B, C, 2 H, 2 W]."""
    rows = torch.stack([x_BCHW, torch.zeros_like(x_BCHW)], dim=3).flatten(2, 3)
    return torch.stack([rows, torch.zeros_like(rows)], dim=4).flatten(3, 4)


def filtered(x_BCHW: Tensor, *, pad: tuple[int, int]) -> Tensor:
    """The low-pass filter [1, 3, 3, 1] along both axes, with gain 4 and `pad` zeros before and after."""
    taps = x_BCHW.new_tensor([1.0, 3.0, 3.0, 1.0])
    kernel = 4 * torch.outer(taps, taps) / 64
    channels = x_BCHW.shape[1]
    return F.conv2d(F.pad(x_BCHW, (*pad, *pad)), kernel.expand(channels, 1, 4, 4), groups=channels)
