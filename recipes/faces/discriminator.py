"""The residual StyleGAN2 discriminator (Karras et al., CVPR 2020, figure 7c) and an encoder of the same blocks.

Both are needed only to train a generator. Knows images and feature maps. Does not know losses or generators.

Shape letters: B batch, I input channels, O output channels, H W map size.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.generators.layers import LEAKY_SLOPE, EqualizedLinear, activate, filter_fir, fir_kernel

MINIBATCH_GROUP = 4


class EqualizedConv(nn.Module):
    """Convolution with run-time weight scale; optional filtered 2x down-sampling, bias and activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, down: bool = False, act: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if act else None
        self.gain = 1.0 / math.sqrt(in_channels * kernel_size**2)
        self.down = down
        self.register_buffer("kernel", fir_kernel(), persistent=False)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """Map [B, I, H, W] => [B, O, H, W], or [B, O, H / 2, W / 2] with `down`, in the same dtype."""
        weight_OIkk = (self.weight * self.gain).to(x_BIHW.dtype)
        size = weight_OIkk.shape[-1]
        if not self.down:
            out = F.conv2d(x_BIHW, weight_OIkk, padding=size // 2)
        elif size == 1:  # a 1x1 convolution commutes with the sampling: filter only the pixels that are kept
            out = F.conv2d(filter_fir(x_BIHW, self.get_buffer("kernel"), pad=(1, 1), stride=2), weight_OIkk)
        else:
            out = F.conv2d(filter_fir(x_BIHW, self.get_buffer("kernel"), pad=(2, 2)), weight_OIkk, stride=2)
        return out if self.bias is None else activate(out, self.bias, None)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; their sum is scaled to unit variance.

    The second convolution and the shortcut down-sample by two.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = EqualizedConv(in_channels, in_channels, 3)
        self.down = EqualizedConv(in_channels, out_channels, 3, down=True)
        self.skip = EqualizedConv(in_channels, out_channels, 1, down=True, act=False)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """Map [B, I, H, W] => [B, O, H / 2, W / 2] in the same dtype."""
        return (self.down(self.conv(x_BIHW)) + self.skip(x_BIHW)) * math.sqrt(0.5)


def minibatch_standard_deviation(x_BCHW: Tensor) -> Tensor:
    """Append the mean standard deviation over groups of samples as one more channel (ProGAN, section 3)."""
    b, _, h, w = x_BCHW.shape
    group = MINIBATCH_GROUP if b % MINIBATCH_GROUP == 0 else b
    y = x_BCHW.float().reshape(group, b // group, *x_BCHW.shape[1:])
    deviation = (y.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    plane = deviation.repeat(group).to(x_BCHW.dtype)[:, None, None, None].expand(-1, 1, h, w)
    return torch.cat([x_BCHW, plane], dim=1)


class Trunk(nn.Module):
    """Images => feature maps, each of half the resolution of the one before; shared by discriminator and encoder.

    Args:
        channels: channels per resolution, from the coarsest upwards.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.from_rgb = EqualizedConv(3, channels[-1], 1)
        # Named from the coarsest upwards so that a network grown by one resolution keeps its blocks' names.
        self.blocks = nn.ModuleList(
            ResidualBlock(fine, coarse) for coarse, fine in zip(channels, channels[1:], strict=False)
        )

    def features(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The maps [B, C_l, H_l, W_l] before and after every block, finest first."""
        maps = [self.from_rgb(images_BCHW.to(dtype).contiguous(memory_format=torch.channels_last))]
        for block in reversed(self.blocks):
            maps.append(block(maps[-1]))
        return maps


class Discriminator(Trunk):
    """Images float32 [B, 3, H, W] in [-1, 1] => logits float32 [B], high for real images.

    Args:
        channels: channels per resolution, from the coarsest (the generator's constant) upwards.
        constant_size: height and width of the coarsest map.
    """

    def __init__(self, *, channels: Sequence[int], constant_size: tuple[int, int] = (4, 4)):
        super().__init__(channels)
        self.conv = EqualizedConv(channels[0] + 1, channels[0], 3)
        self.hidden = EqualizedLinear(channels[0] * constant_size[0] * constant_size[1], channels[0])
        self.out = EqualizedLinear(channels[0], 1)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Logits float32 [B] from the last map of `features`."""
        x = self.conv(minibatch_standard_deviation(x_BCHW)).float()
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2) * math.sqrt(2.0)
        return self.out(x).squeeze(1)

    def forward(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits float32 [B], high for real images; `dtype`: of the convolutions."""
        return self.logits(self.features(images_BCHW, dtype)[-1])


class Encoder(Trunk):
    """Images float32 [B, 3, H, W] in [-1, 1] => mean and log variance float32 [B, z_dim] of q(z | image).

    It has the discriminator's blocks without minibatch statistics, and serves the trainer's autoencoding term.
    """

    def __init__(self, *, channels: Sequence[int], z_dim: int):
        super().__init__(channels)
        self.hidden = EqualizedLinear(channels[0] * 4 * 4, 2 * z_dim)
        self.out = EqualizedLinear(2 * z_dim, 2 * z_dim)

    def forward(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32 [B, z_dim]; `dtype`: of the convolutions."""
        x = self.features(images_BCHW, dtype)[-1].float()
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2) * math.sqrt(2.0)
        mean, log_variance = self.out(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 5)


@torch.no_grad()
def grow(old: Trunk, new: Trunk) -> None:
    """Make `new`, of twice the resolution, compute what `old` computes on the image blurred and halved.

    All layers of `old` are kept except the first, which becomes part of the new block's down-sampling convolution. The
    new layers before that convolution pass the colors on as pairs (c, -c), since lrelu(c) - lrelu(-c) = 1.2 c is
    linear. The other weights of the new block are zero where they would change the result. Without this the old blocks
    would receive noise, and a trained generator would face an untrained discriminator.

    Raises:
        ValueError: fewer than six channels at the finest resolution.
    """
    if len(new.from_rgb.weight) < 6:
        raise ValueError(
            f"{len(new.from_rgb.weight)} channels at the finest resolution cannot pass on 3 colors as pairs; use at "
            "least 6"
        )
    state = old.state_dict()
    new.load_state_dict({k: v for k, v in state.items() if not k.startswith("from_rgb")}, strict=False)
    first, finest, block = cast(Any, old.from_rgb), cast(Any, new.from_rgb), cast(Any, new.blocks[len(old.blocks)])
    eye = torch.eye(3)
    pairs = torch.cat([eye, -eye])  # [6, 3]: colors => their pairs
    undo = pairs.T / ((1 + LEAKY_SLOPE) * math.sqrt(2.0))  # [3, 6]: activated pairs => colors
    for layer in (finest, block.conv, block.down):
        layer.bias.zero_()
    finest.weight[:6, :, 0, 0] = pairs / finest.gain
    block.conv.weight[:6] = 0
    block.conv.weight[:6, :6, 1, 1] = pairs @ undo / block.conv.gain
    block.down.weight.zero_()
    colors = first.weight[:, :, 0, 0] * first.gain
    block.down.weight[:, :6, 1, 1] = math.sqrt(2.0) * colors @ undo / block.down.gain
    block.down.bias.copy_(math.sqrt(2.0) * first.bias)
    block.skip.weight.zero_()
