"""Keypoints: one heatmap per named point (HandsOff, appendix A.4).

    points (x, y) => Keypoints.heatmaps => targets for fitting
    streamed labels => decode_heatmaps => points (x, y)

Knows points, their names, and the Gaussians that represent them. Does not know what the pixels show.

Shape letters: N images, M ensemble members, P pixels, K points, H W image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from handsoff_stream.tasks.base import Task
from handsoff_stream.tasks.regression import mean_squared_error
from handsoff_stream.uncertainty import variance


@dataclass(frozen=True)
class Keypoints(Task):
    """Mean squared error, mean, variance (HandsOff, section 3.3).

    Raises:
        ValueError: no names, a name twice, or a variance that is not positive.
    """

    point_names: Sequence[str]
    """Name of each point; the position is the channel of its heatmap."""
    heatmap_variance: float = 5.0
    """Variance of the Gaussians in square pixels of the label. The paper calls it sigma, and uses 25 for full bodies
    and 5 for faces at CelebA's 178 x 218 pixels. Multiply it by s^2 for labels that are s times larger."""

    name: ClassVar[str] = "keypoints"
    peak: ClassVar[float] = 10.0
    """Value of a heatmap at its point."""

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.point_names)
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"point_names={list(names)} do not tell the points apart; name at least one point, and each once"
            )
        if not (math.isfinite(self.heatmap_variance) and self.heatmap_variance > 0):
            raise ValueError(
                f"heatmap_variance={self.heatmap_variance} makes no Gaussian; pass a positive number of square pixels"
            )
        # Lists arrive from JSON; tuples make equal tasks equal, and hashable.
        object.__setattr__(self, "point_names", names)

    @property
    def num_outputs(self) -> int:
        """K: one heatmap per point."""
        return len(self.point_names)

    def loss(self, outputs_PK: Tensor, target_P: Tensor) -> Tensor:
        """Mean squared error over the labelled entries; 0 if there are none. `target_P`: floating point [P, K].

        NaN is unlabelled: fill the heatmap of a point with NaN in images where that point was not annotated.
        """
        return mean_squared_error(outputs_PK, target_P)

    def decide(self, outputs_MPK: Tensor) -> Tensor:
        """Mean of the members: one value per heatmap, float32 [P, K]."""
        return outputs_MPK.float().mean(dim=0)

    def disagreement(self, outputs_MPK: Tensor) -> Tensor:
        """Variance across the members, averaged over the heatmaps, float32 [P]."""
        return variance(outputs_MPK)

    def heatmaps(self, points_NK2: Tensor, visible_NK: Tensor, size: tuple[int, int]) -> Tensor:
        """Points => targets to fit: peak * exp(-d^2 / (2 * heatmap_variance)), where d is the distance in pixels.

        Args:
            points_NK2: floating point (x, y) in pixels of the label, with pixel centers at integers. Points outside the
                image are allowed: the heatmap holds the part of the Gaussian that reaches into the image.
            visible_NK: bool; the heatmap of a point that is not visible is zero, whatever its coordinates.
            size: (H, W) of the label.

        Returns:
            float32 [N, H, W, K], as `fit_label_generator` takes targets.

        Raises:
            ValueError: not K points per image, or a visible point without finite coordinates.
        """
        expected = (len(points_NK2), self.num_outputs)
        if tuple(points_NK2.shape) != (*expected, 2) or tuple(visible_NK.shape) != expected:
            raise ValueError(
                f"points {list(points_NK2.shape)} and visible {list(visible_NK.shape)} are not [N, {self.num_outputs}, "
                f"2] and [N, {self.num_outputs}]; give every image the points {list(self.point_names)}, in this order"
            )
        if not points_NK2[visible_NK].isfinite().all():
            raise ValueError("a visible point has no finite coordinates; mark it as not visible, or correct it")
        known_NK2 = torch.where(visible_NK[..., None], points_NK2, 0.0).float()
        x_NWK = self._profile(known_NK2[..., 0], size[1])
        y_NHK = self._profile(known_NK2[..., 1], size[0]) * visible_NK[:, None]
        return self.peak * y_NHK[:, :, None] * x_NWK[:, None]

    def _profile(self, position_NK: Tensor, length: int) -> Tensor:
        """The Gaussian along one axis, [N, length, K]; a two-dimensional Gaussian is the product of two of them."""
        offset = torch.arange(length, device=position_NK.device)[:, None] - position_NK[:, None]
        return torch.exp(-offset.square() / (2 * self.heatmap_variance))


def decode_heatmaps(heatmaps_KHW: Tensor) -> tuple[Tensor, Tensor]:
    """Heatmaps => points, each the pixel of its heatmap's maximum (HandsOff, appendix A.4).

    Args:
        heatmaps_KHW: floating point [..., K, H, W], a streamed label or a batch of them.

    Returns:
        (points, maxima). The points are (x, y) in pixels, float32 [..., K, 2]; among equal maxima the first in reading
        order counts. The maxima [..., K] are near `Keypoints.peak` where a point was found, and near 0 where not.
    """
    maxima_K, position_K = heatmaps_KHW.flatten(-2).max(dim=-1)
    width = heatmaps_KHW.shape[-1]
    return torch.stack([position_K % width, position_K // width], dim=-1).float(), maxima_K
