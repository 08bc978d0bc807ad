"""What every generator family offers, and nothing else.

Knows: latents, style vectors, images, feature maps. Does not know: labels, classes, tasks, files, streams.

Shape letters: B batch, D latent size, L number of style inputs, H W image size.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from handsoff_stream.features import FeaturePyramid

Noise = Literal["const", "none"] | Sequence[Tensor]


@dataclass(frozen=True)
class Synthesis:
    """One pass of a generator."""

    images: Tensor
    """float32 [B, 3, H, W], nominally in [-1, 1], not clamped."""
    features: FeaturePyramid
    """The feature maps of the same pass at their native resolutions, in hypercolumn order."""


class Generator(nn.Module, ABC):
    """A pre-trained image generator: z -> w -> (image, feature maps).

    A family is one file with one final subclass; foreign checkpoints are wrapped to this calling convention at the
    border (`generators.checkpoints`). The lifecycle is: build from `config()`, load a state dict, `eval()`, call.
    """

    family: ClassVar[str]
    w_avg: Tensor
    """float32 [D], the centre of truncation."""

    @property
    @abstractmethod
    def resolution(self) -> tuple[int, int]:
        """Image size (H, W) in pixels; not always square."""

    @property
    @abstractmethod
    def num_ws(self) -> int:
        """Number of style inputs L of `synthesis`."""

    @property
    @abstractmethod
    def z_dim(self) -> int:
        """Size of z."""

    @property
    @abstractmethod
    def w_dim(self) -> int:
        """Size of w."""

    @property
    def label_dim(self) -> int:
        """Size of the class condition that `mapping` needs; 0 for an unconditional generator."""
        return 0

    @property
    @abstractmethod
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each map of the pyramid; their sum is the size C of a hypercolumn."""

    @property
    @abstractmethod
    def feature_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each map of the pyramid, in the order of `feature_channels`."""

    @property
    @abstractmethod
    def constant_map(self) -> Tensor | None:
        """float32 [C, h, w], the first feature map if it is the same for every latent, as StyleGAN2's learned constant
        is; None if it varies."""

    @property
    @abstractmethod
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each noise map that `synthesis` takes; empty for a family without noise."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able; `type(g)(**g.config())` has the same geometry."""

    @abstractmethod
    def mapping(self, z_BD: Tensor, label: Tensor | None = None) -> Tensor:
        """z => w.

        Args:
            z_BD: float32 [B, z_dim], standard normal.
            label: float32 [B, label_dim], the class condition of a conditional generator; unconditional ones
                refuse it.

        Returns:
            float32 [B, w_dim], before truncation.
        """

    @abstractmethod
    def synthesis(self, w_plus_BLD: Tensor, noise: Noise = "const", *, dtype: torch.dtype | None = None) -> Synthesis:
        """w+ => image and feature maps.

        Args:
            w_plus_BLD: float32 [B, num_ws, w_dim].
            noise: "const" for the maps stored in the checkpoint, "none", or one float32 tensor
                [1 or B, 1, h, w] per entry of `noise_shapes`.
            dtype: dtype of the convolutions, and of the feature maps they give; None means that of the weights. In
                half precision a family may keep some of them in float32.

        Raises:
            ValueError: a shape that does not fit.
        """

    def fold(self, dtype: torch.dtype | None = None) -> Callable[..., Synthesis]:
        """`synthesis` of the present weights in one dtype, prepared for many calls `(w_plus_BLD, noise="const")`.

        The same bits, sooner: what depends on the weights alone is not computed at every call. After a change of the
        weights, or of their device, fold again.
        """
        return functools.partial(self.synthesis, dtype=dtype)

    def truncate(self, w_BD: Tensor, psi: float = 1.0, cutoff: int | None = None) -> Tensor:
        """w => w+ by the truncation trick (StyleGAN, Karras et al. 2019, section B): w_avg + psi * (w - w_avg).

        Args:
            w_BD: float32 [B, w_dim].
            psi: 0 gives the average image, 1 leaves w alone.
            cutoff: truncate only the first `cutoff` style inputs; None means all.

        Returns:
            float32 [B, num_ws, w_dim].
        """
        w_plus_BLD = w_BD.unsqueeze(1).expand(-1, self.num_ws, -1)
        if psi == 1.0:
            return w_plus_BLD
        truncated_BLD = self.w_avg.lerp(w_plus_BLD, psi)
        if cutoff is None:
            return truncated_BLD
        return torch.cat([truncated_BLD[:, :cutoff], w_plus_BLD[:, cutoff:]], dim=1)
