"""The interface of every generator family.

Knows latents, style vectors, images and feature maps. Does not know labels, tasks, files or streams.

Shape letters: B batch, D latent size, L number of style inputs, C channels, H W image size, h w size of a feature map.
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
"""The noise inputs of a synthesis; see `Generator.synthesis`."""


@dataclass(frozen=True)
class Synthesis:
    """The result of one pass of a generator."""

    images: Tensor
    """float32 [B, 3, H, W], nominally in [-1, 1], not clamped."""
    features: FeaturePyramid
    """The feature maps at their native resolutions, in hypercolumn order."""


class Generator(nn.Module, ABC):
    """A pretrained image generator: z => w => image and feature maps.

    A family is one subclass. Build it from `config()`, load a state dict, and call `eval()` before use. Files in the
    formats of other projects are converted when they are read (`generators.published`).
    """

    family: ClassVar[str]
    """Name of the family, which checkpoints record."""
    w_avg: Tensor
    """float32 [w_dim], the mean of w, which is the center of truncation."""

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
        """Size of the input latent z."""

    @property
    @abstractmethod
    def w_dim(self) -> int:
        """Size of the style vector w."""

    @property
    def label_dim(self) -> int:
        """Size of the class condition that `mapping` takes; 0 for an unconditional generator."""
        return 0

    @property
    @abstractmethod
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map; their sum is the size of a hypercolumn."""

    @property
    @abstractmethod
    def feature_sizes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each feature map, in the order of `feature_channels`."""

    @property
    @abstractmethod
    def constant_map(self) -> Tensor | None:
        """The first feature map, float32 [C, h, w], if it is the same for every latent; None if it varies.

        In StyleGAN2 it is the learned constant.
        """

    @property
    @abstractmethod
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each noise map that `synthesis` takes; empty for a family without noise."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The keyword arguments of the constructor, JSON-able; `type(g)(**g.config())` has the same geometry."""

    @abstractmethod
    def mapping(self, z_BD: Tensor, label: Tensor | None = None) -> Tensor:
        """z => w.

        Args:
            z_BD: float32 [B, z_dim], standard normal.
            label: float32 [B, label_dim], the class condition of a conditional generator; None for an unconditional
                one.

        Returns:
            float32 [B, w_dim], before truncation.

        Raises:
            ValueError: a label for an unconditional generator, or none, or one of another shape, for a conditional one.
        """

    @abstractmethod
    def synthesis(self, w_plus_BLD: Tensor, noise: Noise = "const", *, dtype: torch.dtype | None = None) -> Synthesis:
        """w+ => image and feature maps.

        Args:
            w_plus_BLD: float32 [B, num_ws, w_dim].
            noise: "const" for the noise maps stored in the checkpoint, "none" for no noise, or one float32 tensor
                [1 or B, 1, h, w] per entry of `noise_shapes`.
            dtype: of the convolutions and of their feature maps; None: that of the weights. In half precision a family
                may keep some convolutions in float32.

        Raises:
            ValueError: `w_plus_BLD` or a noise map has another shape.
        """

    def fold(self, dtype: torch.dtype | None = None) -> Callable[..., Synthesis]:
        """`synthesis` with the current weights in one dtype, prepared for many calls.

        What depends on the weights alone is computed once, here; the results are bitwise those of `synthesis`. After
        the weights or their device have changed, fold again.

        Args:
            dtype: see `synthesis`.

        Returns:
            A function of `(w_plus_BLD, noise="const")`.
        """
        return functools.partial(self.synthesis, dtype=dtype)

    def truncate(self, w_BD: Tensor, psi: float = 1.0, cutoff: int | None = None) -> Tensor:
        """w => w+ by the truncation trick, w_avg + psi * (w - w_avg) (StyleGAN, Karras et al., CVPR 2019, appendix B).

        Args:
            w_BD: float32 [B, w_dim].
            psi: 0 gives w_avg, 1 keeps w.
            cutoff: truncate only the first `cutoff` style inputs; None: all.

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
