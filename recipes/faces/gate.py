"""A gate that stops a training run from losing what it knew: recall and rare attributes, measured as it goes.

Adversarial training can collapse within a few thousand images, and losses do not show it. Every so many images the gate
measures the averaged generator as `quality` describes and says whether it may pass; the run then keeps its state as the
last good one, or goes back to that. Labelled renders are used by the judge alone, for measuring.

Knows generators, measures and the file of a run's readings. Does not know networks that train, nor how a run goes back.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.generators import Generator
from recipes.faces.quality import Judge, Quality, measure

MIN_RECALL = 0.6
"""Of the best recall among the readings that passed: below it, modes are gone."""
MIN_SHARE = 0.5
"""Of an attribute's share on renders, or of its best share so far if that is smaller."""


@dataclass(frozen=True)
class Reading:
    """What the gate saw when a run had seen `images` images, and what it made of it."""

    images: int
    quality: Quality
    reason: str | None
    """Why the state must not be kept; None if it passes."""


def samples(generator: Generator, count: int, *, psi: float = 1.0, batch: int = 16) -> Iterable[Tensor]:
    """Batches of images float32 [B, 3, H, W] in [0, 1] of fixed random latents; psi 1: not truncated."""
    rng = torch.Generator().manual_seed(0)
    device = generator.w_avg.device
    for z in torch.randn(count, generator.z_dim, generator=rng).split(batch):
        w = generator.mapping(z.to(device))
        images = generator.synthesis(generator.truncate(w, psi)).images
        yield images.add(1).mul(127.5).round().clamp(0, 255) / 255


class Gate:
    """Measures a generator against renders and against its own past.

    Args:
        path: file of the readings, one JSON object per line; those of an earlier start of the run are read from it.
        judge: of this domain.
        reference_ND: its features of as many renders as are to be generated for a reading.
        real_shares: the share of them on which it sees each attribute.
    """

    def __init__(self, path: Path, judge: Judge, reference_ND: Tensor, real_shares: dict[str, float]):
        self.path, self.judge, self.reference_ND, self.real_shares = path, judge, reference_ND, real_shares
        lines = path.read_text().splitlines() if path.exists() else []
        self.readings = [self._parse(json.loads(line)) for line in lines]

    @staticmethod
    def _parse(row: dict[str, Any]) -> Reading:
        return Reading(row["images"], Quality(**row["quality"]), row["reason"])

    def read(self, generator: Generator, images: int) -> Reading:
        """Measure, judge, and append the reading to the file."""
        with torch.inference_mode():
            quality = measure(samples(generator, len(self.reference_ND)), self.judge, self.reference_ND)
        reading = Reading(images, quality, self.objection(quality))
        self.readings.append(reading)
        with self.path.open("a") as log:
            log.write(json.dumps(asdict(reading)) + "\n")
        return reading

    def objection(self, quality: Quality) -> str | None:
        """What is wrong with a generator of this quality, compared with the readings that passed; None if nothing."""
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
        """Whether no other reading that passed is closer to the renders."""
        passed = [past.quality.distance for past in self.readings if past.reason is None]
        return reading.reason is None and reading.quality.distance <= min(passed)
