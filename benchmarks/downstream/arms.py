"""The arms of `comparison`: which labelled images a network sees in which steps, and how it is trained on them.

Knows batches and how a network is trained and scored. Does not know how arms are compared.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.downstream.batches import Experiment, labelled, mixed, sampled, stream, teacher_labelled, unlimited
from handsoff_stream.downstream import SegmentationScores, evaluate, train_segmentation


@dataclass(frozen=True)
class Phase:
    """A part of an arm's steps that all use the same batches and learning rate."""

    batches: Callable[[Experiment, int, int], Iterable[Any]]
    """(experiment, seed, steps) => (images, labels) batches."""
    share: float = 1.0
    """Share of the arm's steps, in (0, 1]."""
    rate: float = 1.0
    """Factor on the experiment's learning rate."""


@dataclass(frozen=True)
class Arm:
    """One way to train the network: its phases run one after the other, and their shares sum to 1."""

    phases: tuple[Phase, ...]
    frozen: bool = False
    """Whether the backbone is frozen, so that the head alone is trained."""
    needs: str = ""
    """What the arm needs besides labelled images: "", "checkpoint", or "teacher" (a checkpoint and a teacher)."""


ARMS: dict[str, Arm] = {
    "transfer": Arm((Phase(labelled),), frozen=True),
    "labelled": Arm((Phase(labelled),)),
    "stream": Arm((Phase(stream),), needs="checkpoint"),
    "mixed": Arm((Phase(mixed),), needs="checkpoint"),
    "stream-then-labelled": Arm((Phase(stream, 0.8), Phase(labelled, 0.2, rate=0.1)), needs="checkpoint"),
    "datasetgan": Arm((Phase(sampled),), needs="teacher"),
    "teacher-labelled": Arm((Phase(teacher_labelled),), needs="teacher"),
    "unlimited": Arm((Phase(unlimited),)),
}


@dataclass(frozen=True)
class Outcome:
    """What one training took, and how the trained network scored."""

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
        """JSON-able; the test scores are under "scores"."""
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
    """Train one network on one arm and score it on test renders.

    Validation renders are scored after the steps that `experiment.curve` lists.
    """
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
