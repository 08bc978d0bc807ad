"""The StyleGAN2 generator: mapping network, synthesis network, feature maps.

Written from the paper: StyleGAN2 (Karras et al., CVPR 2020; "SG2" below), with the conditional mapping of its official
code. Knows the skip, residual and plain architectures, with constants of any shape and any channel table. Does not know
file formats, labels of pixels, or training losses.

Shape letters: B batch, D latent size, L number of style inputs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.generators.base import Generator, Noise, Synthesis
from handsoff_stream.generators.layers import LEAKY_GAIN, LEAKY_SLOPE, EqualizedLinear, normal, normalize
from handsoff_stream.generators.stylegan2.folded import FoldedBlock, FoldedSynthesis
from handsoff_stream.generators.stylegan2.style_layers import ResidualProjection, StyleLayer, ToRGB

ARCHITECTURES = ("skip", "resnet", "orig")
FLOAT32_SIZE = 16
"""Maps up to this size stay in float32 instead of bfloat16, which would save little time there and whose rounding
errors all finer maps would inherit."""


class SynthesisBlock(nn.Module):
    """The layers of one resolution: `up` (absent at the constant), `conv`, `to_rgb` (SG2, figure 7).

    With the architecture "skip", every block contributes to the image; with "resnet" and "orig", the last block alone
    makes it. "resnet" adds a projection of the block's input to its output, both scaled to keep the variance.

    Args:
        in_channels: channels of the input map.
        channels: channels of the feature maps.
        w_dim: size of w.
        size: (H, W) of the feature maps.
        clamp: largest magnitude of every layer's output; None: no clamp.
        image_channels: channels of the image.
        architecture: one of `ARCHITECTURES`.
        first: whether the block starts from the constant.
        last: whether its resolution is that of the image.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        w_dim: int,
        *,
        size: tuple[int, int],
        clamp: float | None,
        image_channels: int,
        architecture: str,
        first: bool,
        last: bool,
    ):
        super().__init__()
        residual = architecture == "resnet" and not first
        gain = math.sqrt(0.5) if residual else 1.0
        self.up = None
        if not first:
            self.up = StyleLayer(in_channels, channels, w_dim, up=True, size=size, clamp=clamp)
        self.conv = StyleLayer(channels, channels, w_dim, up=False, size=size, clamp=clamp, gain=gain)
        self.skip = ResidualProjection(in_channels, channels, gain=gain) if residual else None
        makes_image = last or architecture == "skip"
        self.to_rgb = ToRGB(channels, image_channels, w_dim, clamp=clamp) if makes_image else None

    def style_layers(self) -> Iterator[StyleLayer]:
        """The layers whose outputs are feature maps, in order."""
        if self.up is not None:
            yield self.up
        yield self.conv

    def fold(self, dtype: torch.dtype) -> FoldedBlock:
        """The block with convolutions in `dtype`, or in float32 instead of bfloat16 up to `FLOAT32_SIZE`."""
        if dtype == torch.bfloat16 and max(self.conv.size) <= FLOAT32_SIZE:
            dtype = torch.float32
        return FoldedBlock(
            tuple(layer.fold(dtype) for layer in self.style_layers()),
            None if self.skip is None else self.skip.fold(dtype),
            None if self.to_rgb is None else self.to_rgb.fold(),
        )


class StyleGAN2(Generator):
    """The StyleGAN2 generator (Karras et al., CVPR 2020).

    Args:
        channels: channels per resolution, from the constant upwards; their number decides the image size.
        constant_size: (height, width) of the learned constant, (4, 4) for square images.
        z_dim: size of z.
        w_dim: size of w.
        mapping_layers: depth of the mapping network.
        mapping_lr_multiplier: learning-rate multiplier of the mapping network; scales its weights and biases.
        conv_clamp: largest magnitude of every layer's output; None: no clamp.
        image_channels: channels of the image.
        architecture: "skip" (all generators published with the paper), "resnet" or "orig".
        mapping_hidden: width of the inner layers of the mapping network; None: `w_dim`.
        label_dim: size of the class condition, 0 for an unconditional generator.
        label_features: size of the embedded class condition; None: `w_dim`.

    Raises:
        ValueError: an unknown architecture, or a size below 1.
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
        architecture: str = "skip",
        mapping_hidden: int | None = None,
        label_dim: int = 0,
        label_features: int | None = None,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={architecture!r} is unknown; pass one of {list(ARCHITECTURES)}")
        hidden = w_dim if mapping_hidden is None else mapping_hidden
        embedded = 0 if not label_dim else w_dim if label_features is None else label_features
        sizes = (*channels, *constant_size, z_dim, w_dim, mapping_layers, image_channels, hidden, label_dim + 1)
        if len(channels) < 1 or len(constant_size) != 2 or min(sizes) < 1:
            raise ValueError(
                f"channels={list(channels)}, constant_size={list(constant_size)}, z_dim={z_dim}, w_dim={w_dim}, "
                f"mapping_layers={mapping_layers}, image_channels={image_channels}, mapping_hidden={hidden}, "
                f"label_dim={label_dim} describe no generator; pass positive integers, and (height, width) as "
                "constant_size"
            )
        _check_scales(mapping_lr_multiplier, conv_clamp)
        self.channels = tuple(channels)
        self.constant_size = (constant_size[0], constant_size[1])
        self._z_dim, self._w_dim = z_dim, w_dim
        self.mapping_lr_multiplier, self.conv_clamp = mapping_lr_multiplier, conv_clamp
        self.image_channels = image_channels
        self.architecture, self.mapping_hidden = architecture, hidden
        self._label_dim, self.label_features = label_dim, embedded

        self.label_embedding = EqualizedLinear(label_dim, embedded) if label_dim else None
        widths = [z_dim + embedded, *[hidden] * (mapping_layers - 1), w_dim]
        self.mapping_network = nn.ModuleList(
            EqualizedLinear(widths[i], widths[i + 1], lr_multiplier=mapping_lr_multiplier)
            for i in range(mapping_layers)
        )
        self.constant = nn.Parameter(normal(channels[0], *self.constant_size))
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                channels[max(i - 1, 0)],
                channels[i],
                w_dim,
                size=(self.constant_size[0] << i, self.constant_size[1] << i),
                clamp=conv_clamp,
                image_channels=image_channels,
                architecture=architecture,
                first=i == 0,
                last=i == len(channels) - 1,
            )
            for i in range(len(channels))
        )
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @property
    def resolution(self) -> tuple[int, int]:
        """See `Generator.resolution`."""
        scale = len(self.channels) - 1
        return self.constant_size[0] << scale, self.constant_size[1] << scale

    @property
    def num_ws(self) -> int:
        """See `Generator.num_ws`."""
        return 2 * len(self.channels)

    @property
    def z_dim(self) -> int:
        """See `Generator.z_dim`."""
        return self._z_dim

    @property
    def w_dim(self) -> int:
        """See `Generator.w_dim`."""
        return self._w_dim

    @property
    def label_dim(self) -> int:
        """See `Generator.label_dim`."""
        return self._label_dim

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """See `Generator.feature_channels`."""
        first, *rest = self.channels
        return (first, first, *(c for channels in rest for c in (channels, channels)))

    @property
    def feature_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Generator.feature_sizes`."""
        height, width = self.constant_size
        return tuple((height << i, width << i) for i in range(len(self.channels)) for _ in range(2))

    @property
    def constant_map(self) -> Tensor:
        """See `Generator.constant_map`."""
        return self.constant.detach()

    @property
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        """See `Generator.noise_shapes`."""
        return tuple(layer.size for layer in self._style_layers())

    def config(self) -> dict[str, Any]:
        """See `Generator.config`."""
        # Newer arguments are added only where they differ from the defaults: older checkpoints keep their fingerprint.
        unusual: dict[str, Any] = {}
        if self.architecture != "skip":
            unusual["architecture"] = self.architecture
        if self.mapping_hidden != self.w_dim:
            unusual["mapping_hidden"] = self.mapping_hidden
        if self.label_dim:
            unusual |= {"label_dim": self.label_dim, "label_features": self.label_features}
        return {
            "channels": list(self.channels),
            "constant_size": list(self.constant_size),
            "z_dim": self.z_dim,
            "w_dim": self.w_dim,
            "mapping_layers": len(self.mapping_network),
            "mapping_lr_multiplier": self.mapping_lr_multiplier,
            "conv_clamp": self.conv_clamp,
            "image_channels": self.image_channels,
            **unusual,
        }

    def mapping(self, z_BD: Tensor, label: Tensor | None = None) -> Tensor:
        """See `Generator.mapping`."""
        x = normalize(z_BD)
        if self.label_embedding is not None:
            if label is None or label.shape != (len(z_BD), self.label_dim):
                raise ValueError(
                    f"label is {None if label is None else list(label.shape)}, but this generator is conditional: pass "
                    f"float32 [{len(z_BD)}, {self.label_dim}], one-hot for classes"
                )
            x = torch.cat([x, normalize(self.label_embedding(label))], dim=1)
        elif label is not None:
            raise ValueError(
                f"label is {list(label.shape)}, but this generator is unconditional; call mapping(z) without a label"
            )
        for layer in self.mapping_network:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE) * LEAKY_GAIN
        return x

    def fold(self, dtype: torch.dtype | None = None) -> FoldedSynthesis:
        """See `Generator.fold`."""
        dtype = dtype or self.constant.dtype
        return FoldedSynthesis(
            constant=self.constant[None].contiguous(memory_format=torch.channels_last),
            blocks=tuple(block.fold(dtype) for block in self._blocks()),
            noise_const=tuple(layer.get_buffer("noise_const") for layer in self._style_layers()),
            w_dim=self.w_dim,
        )

    def synthesis(self, w_plus_BLD: Tensor, noise: Noise = "const", *, dtype: torch.dtype | None = None) -> Synthesis:
        """See `Generator.synthesis`."""
        return self.fold(dtype)(w_plus_BLD, noise)

    def _blocks(self) -> Iterator[SynthesisBlock]:
        for block in self.blocks:
            assert isinstance(block, SynthesisBlock)
            yield block

    def _style_layers(self) -> Iterator[StyleLayer]:
        for block in self._blocks():
            yield from block.style_layers()


def _check_scales(mapping_lr_multiplier: float, conv_clamp: float | None) -> None:
    if not 0 < mapping_lr_multiplier < math.inf or (conv_clamp is not None and not 0 < conv_clamp < math.inf):
        raise ValueError(
            f"mapping_lr_multiplier={mapping_lr_multiplier}, conv_clamp={conv_clamp}: pass positive numbers, or None "
            "for no clamp"
        )
