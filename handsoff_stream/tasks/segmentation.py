"""Segmentation: one class id per pixel.

Knows class ids, names and display colors. Does not know what the pixels show, or where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.class_ids import IGNORE_INDEX, Color
from handsoff_stream.tasks.base import Task
from handsoff_stream.uncertainty import jensen_shannon_divergence, majority_vote, mean_probabilities


@dataclass(frozen=True)
class Segmentation(Task):
    """Cross-entropy, majority vote, Jensen-Shannon divergence (HandsOff, section 3.3).

    Raises:
        ValueError: fewer than 2 or more than 255 classes, or a palette that does not fit them.
    """

    class_names: Sequence[str]
    """Name of each class; the position is the id."""
    palette: Sequence[Color]
    """Display color of each class, RGB, 0 to 255."""

    name: ClassVar[str] = "segmentation"
    ignore_index: ClassVar[int] = IGNORE_INDEX
    """Id of unlabelled pixels, which do not count in the loss and are never predicted."""

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.class_names)
        palette = tuple(tuple(int(channel) for channel in color) for color in self.palette)
        if not 2 <= len(names) <= self.ignore_index:
            raise ValueError(
                f"{len(names)} classes are too few or too many, since id {self.ignore_index} marks unlabelled pixels; "
                f"pass 2 to {self.ignore_index} classes"
            )
        if len(palette) != len(names):
            raise ValueError(f"{len(palette)} palette colors do not fit {len(names)} classes; pass one per class")
        for color in palette:
            if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
                raise ValueError(f"{color} is not a palette color; pass three integers from 0 to 255")
        # Lists arrive from JSON; tuples make equal tasks equal, and hashable.
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "palette", palette)

    @property
    def num_classes(self) -> int:
        """K: number of classes, without the unlabelled id."""
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """K: one logit per class."""
        return self.num_classes

    def loss(self, outputs_PK: Tensor, target_P: Tensor) -> Tensor:
        """Mean cross-entropy over the labelled pixels, in nats; 0 if there are none. `target_P`: int64 class ids."""
        total = F.cross_entropy(outputs_PK, target_P, ignore_index=self.ignore_index, reduction="sum")
        return total / (target_P != self.ignore_index).sum().clamp(min=1)

    def decide(self, outputs_MPK: Tensor) -> Tensor:
        """Majority vote of the members, int64 [P]; ties go to the smallest id."""
        return majority_vote(outputs_MPK.argmax(dim=-1), self.num_classes)

    def probabilities(self, outputs_MPK: Tensor) -> Tensor:
        """Mean of the members' class distributions, float32 [P, K]: a soft label."""
        return mean_probabilities(outputs_MPK)

    def disagreement(self, outputs_MPK: Tensor) -> Tensor:
        """Jensen-Shannon divergence of the members, float32 [P], in nats."""
        return jensen_shannon_divergence(outputs_MPK)
