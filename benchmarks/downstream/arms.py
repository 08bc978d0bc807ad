"""The arms of `comparison`: which labelled images a network sees in which steps, and how it is trained on them.

Knows batches and how a network is trained and scored. Does not know how arms are compared.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.downstream.batches import Experiment, judged, labelled, mixed, sampled, stream, unlimited
from handsoff_stream.downstream import SegmentationScores, evaluate, train_segmentation


@dataclass(frozen=True)
class Phase:
    """Some of an arm's steps."""

    batches: Callable[[Experiment, int, int], Iterable[Any]]
    """(experiment, seed, steps) => (images, labels) batches."""
    share: float = 1.0
    """Of the steps."""
    rate: float = 1.0
    """Times the learning rate."""


@dataclass(frozen=True)
class Arm:
    phases: tuple[Phase, ...]
    frozen: bool = False
    """Train the head only."""
    needs: str = ""
    """What else it takes: a "checkpoint", or a "judge" too."""


ARMS: dict[str, Arm] = {
    "transfer": Arm((Phase(labelled),), frozen=True),
    "labelled": Arm((Phase(labelled),)),
    "stream": Arm((Phase(stream),), needs="checkpoint"),
    "mixed": Arm((Phase(mixed),), needs="checkpoint"),
    "stream-then-labelled": Arm((Phase(stream, 0.8), Phase(labelled, 0.2, rate=0.1)), needs="checkpoint"),
    "datasetgan": Arm((Phase(sampled),), needs="judge"),
    "judged": Arm((Phase(judged),), needs="judge"),
    "unlimited": Arm((Phase(unlimited),)),
}


@dataclass(frozen=True)
class Outcome:
    """One training and its test."""

    arm: str
    seed: int
    seconds: float
    seconds_waiting: float
    last_loss: float
    """Mean over the last 20 steps."""
    curve: tuple[tuple[int, float], ...]
    """(step, mIoU on validation renders)."""
    scores: SegmentationScores

    def record(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "seconds_waiting": round(self.seconds_waiting, 2),
            "last_loss": round(self.last_loss, 4),
            "validation": [{"step": step, "miou": miou} for step, miou in self.curve],
            "scores": self.scores.record(),
        }


def run(experiment: Experiment, arm: str, seed: int) -> Outcome:
    """Train one network on one arm and score it on test renders; validation renders are scored on the way."""
    torch.manual_seed(seed)  # dropout
    model = experiment.network(seed)
    if ARMS[arm].frozen:
        model.freeze_backbone()
    validation = experiment.faces("validation", experiment.validation_images)
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    seconds = waiting = 0.0
    done = 0
    for phase in ARMS[arm].phases:
        steps = round(phase.share * experiment.steps)

        def look(step: int, _: float, done: int = done) -> None:
            if done + step in experiment.curve:
                scores = evaluate(model, validation, experiment.class_names, dtype=experiment.torch_dtype)
                curve.append((done + step, scores.miou))

        report = train_segmentation(
            model,
            phase.batches(experiment, seed, steps),
            steps=steps,
            lr=phase.rate * experiment.lr,
            schedule=experiment.schedule,
            warmup=experiment.warmup,
            dtype=experiment.torch_dtype,
            progress=look if experiment.curve else None,
        )
        losses += report.losses
        seconds, waiting, done = seconds + report.seconds, waiting + report.seconds_waiting, done + steps
    test = experiment.faces("test", experiment.test_images)
    scores = evaluate(model, test, experiment.class_names, dtype=experiment.torch_dtype)
    return Outcome(arm, seed, seconds, waiting, statistics.fmean(losses[-20:]), tuple(curve), scores)
