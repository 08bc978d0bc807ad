"""Depth: one number per pixel, in the unit of the labels it was fitted on.

Knows numbers. Does not know their unit, what the pixels show, or where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from handsoff_stream.tasks.base import Task
from handsoff_stream.tasks.regression import mean_squared_error
from handsoff_stream.uncertainty import variance


@dataclass(frozen=True)
class Depth(Task):
    """Mean squared error on valid pixels, mean, variance (HandsOff, sections 3.3 and 4.4).

    Depths are learned fastest in a unit in which they are close to one, so divide the meters of a street scene by 10.
    Predictions are meaningless where no labelled image has a valid depth, as in the sky.
    """

    name: ClassVar[str] = "depth"

    @property
    def num_outputs(self) -> int:
        """K = 1."""
        return 1

    def loss(self, outputs_PK: Tensor, target_P: Tensor) -> Tensor:
        """Mean squared error over the valid pixels; 0 if there are none. `target_P`: floating point [P] or [P, 1].

        A pixel is valid if its depth is finite: mark missing and corrupted depths with NaN or infinity.
        """
        return mean_squared_error(outputs_PK, target_P)

    def decide(self, outputs_MPK: Tensor) -> Tensor:
        """Mean of the members, float32 [P, 1]."""
        return outputs_MPK.float().mean(dim=0)

    def disagreement(self, outputs_MPK: Tensor) -> Tensor:
        """Variance across the members, float32 [P], in the square of the depths' unit."""
        return variance(outputs_MPK)
