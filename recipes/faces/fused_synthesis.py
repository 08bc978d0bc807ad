"""StyleGAN2's synthesis for training, with compiled element-wise operations and eager convolutions.

On devices with bfloat16 products, element-wise operations on large maps take more of a training step than convolutions.
`torch.compile` fuses the operations before a convolution into one pass over memory, and those after it into another.
Compiling the convolutions as well made steps several times slower; log.md has the figures. Without a working compiler
the same functions run eagerly.

Knows one pass of the network. Does not know parameters, losses or file formats. Shape letters: B batch, I input
channels, O output channels, H W map size, D latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.generators.layers import LEAKY_SLOPE, filter_fir
from handsoff_stream.generators.stylegan2.folded import FoldedStyleLayer, FoldedSynthesis

VARIANTS = 64  # combinations of map size, channels and batch, each of which is compiled once


def modulate(x_BIHW: Tensor, style_BI: Tensor) -> Tensor:
    """Each input channel times its style."""
    return x_BIHW * style_BI[:, :, None, None]


def finish(y_BOHW: Tensor, demodulation_BO: Tensor, shift_B1HW: Tensor, bias_O: Tensor) -> Tensor:
    """Demodulation, noise, bias and leaky ReLU; the gain is in the factors (see `FoldedStyleLayer`)."""
    y_BOHW = y_BOHW * demodulation_BO[:, :, None, None] + (shift_B1HW + bias_O[:, None, None]).to(y_BOHW.dtype)
    return F.leaky_relu(y_BOHW, LEAKY_SLOPE)


@cache
def compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`modulate` and `finish`, compiled if a small forward and backward pass shows that this machine can."""
    config = torch._dynamo.config  # torch 2.7 calls the limit `recompile_limit` and keeps the older name
    config.cache_size_limit = max(config.cache_size_limit, VARIANTS)
    functions = torch.compile(modulate, dynamic=False), torch.compile(finish, dynamic=False)
    try:
        x = torch.ones(1, 2, 4, 4, requires_grad=True)
        functions[1](
            functions[0](x, torch.ones(1, 2)), torch.ones(1, 2), torch.ones(1, 1, 4, 4), torch.ones(2)
        ).sum().backward()
    except RuntimeError as error:  # what torch raises for a missing compiler and for one that fails
        print(f"torch.compile does not work here, so training steps take longer: {str(error).splitlines()[0]}")
        return modulate, finish
    return functions


@dataclass(frozen=True, eq=False)
class FusedStyleLayer(FoldedStyleLayer):
    """The same layer in two passes and a convolution, for generators without a clamp."""

    def __call__(self, x_BIHW: Tensor, w_BD: Tensor, noise: Tensor | None) -> Tensor:
        before, after = compiled()
        style_BI, demodulation_BO = self._modulation(w_BD)
        x_BIHW = before(x_BIHW.to(self.weight.dtype), style_BI)
        if self.kernel is None:
            y_BOHW = F.conv2d(x_BIHW, self.weight, padding=1)
        else:
            y_BOHW = filter_fir(F.conv_transpose2d(x_BIHW, self.weight, stride=2), self.kernel, pad=(1, 1))
        shift_B1HW = torch.zeros_like(y_BOHW[:, :1]) if noise is None else noise * self.noise_strength
        return after(y_BOHW, demodulation_BO, shift_B1HW, self.bias_O)


def fuse(folded: FoldedSynthesis) -> FoldedSynthesis:
    """The same network with fused layers; layers that clamp stay as they are."""
    blocks = tuple(
        replace(
            block,
            style_layers=tuple(
                FusedStyleLayer(**vars(layer)) if layer.clamp is None else layer for layer in block.style_layers
            ),
        )
        for block in folded.blocks
    )
    return replace(folded, blocks=blocks)
