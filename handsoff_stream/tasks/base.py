"""The interface of a label type: its training loss, the ensemble's decision, and the ensemble's disagreement.

Knows the outputs of single pixels. Does not know images, resolutions, devices or file formats.

To add a label type: one file with one frozen dataclass, and one line in the registry of `tasks/__init__.py`.

Shape letters: M ensemble members, P pixels, K outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor


@dataclass(frozen=True)
class Task(ABC):
    """A label type. The dataclass fields of a subclass are its configuration and must be JSON-able."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """K: how many numbers the label generator predicts per pixel."""

    @abstractmethod
    def loss(self, outputs_PK: Tensor, target_P: Tensor) -> Tensor:
        """Training loss of one member, a scalar: the mean over the labelled pixels.

        Args:
            outputs_PK: floating point.
            target_P: targets of the pixels, as the subclass defines them.
        """

    @abstractmethod
    def decide(self, outputs_MPK: Tensor) -> Tensor:
        """The ensemble's label of each pixel, [P] or [P, K]; `outputs_MPK`: floating point."""

    @abstractmethod
    def disagreement(self, outputs_MPK: Tensor) -> Tensor:
        """Uncertainty of each pixel by a formula of `uncertainty`, float32 [P], at least 0."""

    def probabilities(self, outputs_MPK: Tensor) -> Tensor | None:
        """The ensemble's soft label of each pixel, float32 [P, K]; None for a label type without classes."""
        return None

    def config(self) -> dict[str, Any]:
        """JSON-able description, from which `from_config` builds an equal task."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The task that `config` describes.

        Raises:
            ValueError: entries that differ from those of `config()`.
        """
        expected = {"name", *(field.name for field in fields(cls))}
        if set(config) != expected or config["name"] != cls.name:
            raise ValueError(
                f"{dict(config)!r} does not describe a {cls.name!r} task, which has the entries {sorted(expected)}; "
                "write the description with Task.config()"
            )
        return cls(**{key: value for key, value in config.items() if key != "name"})
