"""A check that detects when a training run loses modes or rare attributes.

Adversarial training can collapse within a few thousand images, and its losses do not show it. At fixed intervals the
gate measures the averaged generator as `quality` describes, and decides whether it passes. If it does, the run keeps
its state as the last good one; if not, the run returns to that state. Labelled renders are used only for measuring, by
the teacher.

Knows generators, measures and the file of a run's readings. Does not know the networks that are trained, nor how a run
returns to a state.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.generators import Generator
from recipes.faces.quality import Quality, Teacher, measure

MIN_RECALL = 0.6
"""Share of the best recall among the readings that passed; a lower recall means dropped modes."""
MIN_SHARE = 0.5
"""Factor on an attribute's share on renders, or on its best share so far if that is smaller."""


@dataclass(frozen=True)
class Reading:
    """What the gate measured after a run's first `images` images, and its decision."""

    images: int
    quality: Quality
    reason: str | None
    """Why the generator does not pass; None if it passes."""


def samples(generator: Generator, count: int, *, psi: float = 1.0, batch: int = 16) -> Iterable[Tensor]:
    """Batches of images float32 [B, 3, H, W] in [0, 1], generated from fixed random latents; psi 1: no truncation."""
    rng = torch.Generator().manual_seed(0)
    device = generator.w_avg.device
    for z in torch.randn(count, generator.z_dim, generator=rng).split(batch):
        w = generator.mapping(z.to(device))
        images = generator.synthesis(generator.truncate(w, psi)).images
        yield images.add(1).mul(127.5).round().clamp(0, 255) / 255


class Gate:
    """Compares a generator with renders and with its own earlier readings.

    Args:
        path: file of the readings, one JSON object per line; readings that it already holds are read first.
        teacher: trained on this domain.
        reference_ND: the teacher's features of N renders; each reading generates N images.
        real_shares: attribute => share of those renders on which the teacher sees it.
    """

    def __init__(self, path: Path, teacher: Teacher, reference_ND: Tensor, real_shares: dict[str, float]):
        self.path, self.teacher, self.reference_ND, self.real_shares = path, teacher, reference_ND, real_shares
        lines = path.read_text().splitlines() if path.exists() else []
        self.readings = [self._parse(json.loads(line)) for line in lines]

    @staticmethod
    def _parse(row: dict[str, Any]) -> Reading:
        return Reading(row["images"], Quality(**row["quality"]), row["reason"])

    def read(self, generator: Generator, images: int) -> Reading:
        """Measure the generator after `images` training images, decide, and append the reading to the file."""
        with torch.inference_mode():
            quality = measure(samples(generator, len(self.reference_ND)), self.teacher, self.reference_ND)
        reading = Reading(images, quality, self.objection(quality))
        self.readings.append(reading)
        with self.path.open("a") as log:
            log.write(json.dumps(asdict(reading)) + "\n")
        return reading

    def objection(self, quality: Quality) -> str | None:
        """Why a generator of this quality does not pass, given the readings that passed; None if it passes."""
        passed = [reading.quality for reading in self.readings if reading.reason is None]
        if not passed:
            return None
        recall = max(past.recall for past in passed)
        if quality.recall < MIN_RECALL * recall:
            return f"recall fell from {recall:.2f} to {quality.recall:.2f}"
        for name, real in self.real_shares.items():
            usual = min(real, max(past.shares[name] for past in passed))
            if quality.shares[name] < MIN_SHARE * usual:
                return f"{name}: on {quality.shares[name]:.1%} of the samples, where {usual:.1%} are usual"
        return None

    def is_best(self, reading: Reading) -> bool:
        """Whether `reading` passed, and no other reading that passed is closer to the renders."""
        passed = [past.quality.distance for past in self.readings if past.reason is None]
        return reading.reason is None and reading.quality.distance <= min(passed)
