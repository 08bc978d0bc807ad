"""Fitting a label generator: time to equal accuracy and peak memory, against the published training.

    python -m benchmarks.fitting --images 8

The training images come from the checkpoint's generator, their labels from the checkpoint's label generator. Each side
learns them from scratch in a fresh process, one side after the other. Accuracy is the share of pixels of other such
images that the ensemble labels as the checkpoint does.

The published training (`reference.published_fitting`) is evaluated after each epoch; an ensemble of k epochs exists
when every member has had k. On small sets it would run for up to 100 epochs, so it ends after `--published-epochs`.
Our side is fitted anew for each number of epochs, from the latents on. The times compared are those of the first
evaluations that reach the lower of the two sides' best accuracies.

Peak memory is that of the process, with the interpreter and PyTorch; Linux only. What the published training would need
at its own size is extrapolated and marked so; `benchmarks.fitting_memory` measures ours at that size. The last line of
the output is the result as JSON.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import settings, write_result
from benchmarks.processes import in_fresh_process, peak_mb, reset_peak
from benchmarks.reference import published_fitting as published
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.fitting import FeatureTable, FitSettings, fit_label_generator
from handsoff_stream.fitting.fit import evaluate_label_generator
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Size
from handsoff_stream.seeding import latents
from handsoff_stream.tasks import Task
from handsoff_stream.uncertainty import majority_vote

EVALUATED_PIXELS = 20_000
PUBLISHED = {"images": 50, "pixels": 50 * 512 * 512, "channels": 6080, "members": 10}
"""The size of HandsOff's published training."""


class Labelled(NamedTuple):
    """Images of a generator: w+ float32 [N, L, D], labels int64 [N, H, W]."""

    w_plus: Tensor
    targets: Tensor

    @property
    def size(self) -> Size:
        """(H, W) of the labels."""
        return self.targets.shape[1], self.targets.shape[2]


@torch.no_grad()
def label_samples(name: str, first: int, count: int) -> tuple[Generator, Task, Labelled]:
    """Generator and task of a checkpoint, and `count` of its samples with the labels of its label generator."""
    checkpoint = load_checkpoint(name)
    generator, head, size = checkpoint.generator, checkpoint.heads["segmentation"], checkpoint.size
    z_ND = latents(0, range(first, first + count), generator.z_dim)
    w_plus_NLD = generator.truncate(generator.mapping(z_ND), checkpoint.truncation)
    folded = head.label_generator.fold()
    targets = []
    for w_plus_1LD in w_plus_NLD.split(1):
        tiles = folded.tiles(generator.synthesis(w_plus_1LD, "const").features, size)
        targets.append(torch.cat([head.task.decide(outputs_MPK) for _, outputs_MPK in tiles]).view(size))
    return generator, head.task, Labelled(w_plus_NLD, torch.stack(targets))


class HeldOut:
    """Accuracy on `EVALUATED_PIXELS` random pixels of images that neither side is fitted to."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator, self.task, held_out = label_samples(args.checkpoint, args.images, args.held_out)
        self.table = FeatureTable.collect(generator, held_out.w_plus, held_out.size)
        self.targets_Q = held_out.targets.flatten()
        count, random = min(EVALUATED_PIXELS, len(self.targets_Q)), torch.Generator().manual_seed(0)
        self.pixels_P = torch.randperm(len(self.targets_Q), generator=random)[:count]

    @torch.no_grad()
    def votes(self, member: Callable[[Tensor], Tensor]) -> Tensor:
        """The classes that one member chooses, int64 [P]."""
        return torch.cat([member(self.table.rows(chunk)).argmax(dim=1) for chunk in self.pixels_P.split(2048)])

    def accuracy_of_votes(self, votes_MP: Tensor) -> float:
        """Share of pixels that the majority of the members labels right."""
        right_P = majority_vote(votes_MP, self.task.num_outputs) == self.targets_Q[self.pixels_P]
        return right_P.float().mean().item()


def run_published(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy after each epoch of the published training, its seconds and its memory, JSON-able."""
    held_out = HeldOut(args)
    generator, task, fitted = label_samples(args.checkpoint, 0, args.images)
    reset_peak()
    before_mb, started = peak_mb(), time.perf_counter()
    rows_QC = published.hypercolumn_matrix(generator, fitted.w_plus, fitted.size)
    features_s = time.perf_counter() - started
    votes_M: list[list[Tensor]] = []  # of each member, one entry per epoch
    seconds_M: list[list[float]] = []
    steps = 0
    for m in range(args.members):
        random = torch.Generator().manual_seed(m)
        member = published.make_member(rows_QC.shape[1], tuple(args.hidden), task.num_outputs, random)
        targets_Q = fitted.targets.flatten()
        training = published.train_member(member, rows_QC, targets_Q, random, max_epochs=args.published_epochs)
        evaluations = [(held_out.votes(member), steps_m, seconds) for steps_m, seconds in training]
        votes_M.append([votes for votes, _, _ in evaluations])
        seconds_M.append([seconds for _, _, seconds in evaluations])
        steps += evaluations[-1][1]
    curve = []
    for epochs in range(1, 1 + max(map(len, seconds_M))):  # a member that has ended keeps its last state
        seconds = features_s + sum(each[:epochs][-1] for each in seconds_M)
        votes_MP = torch.stack([votes[:epochs][-1] for votes in votes_M])
        curve.append({"epochs": epochs, "seconds": seconds, "accuracy": held_out.accuracy_of_votes(votes_MP)})
    return {
        "curve": curve,
        "before_mb": before_mb,
        "peak_mb": peak_mb(),
        "matrix_mb": rows_QC.nbytes / 1e6,
        "steps": steps,
        "steps_per_s": steps / sum(each[-1] for each in seconds_M),
    }


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of one fit per entry of `--epochs`, its seconds and its memory, JSON-able."""
    held_out = HeldOut(args)
    generator, task, fitted = label_samples(args.checkpoint, 0, args.images)
    reset_peak()
    before_mb = peak_mb()
    curve = []
    for epochs in args.epochs:
        settings = FitSettings(hidden=tuple(args.hidden), members=args.members, epochs=epochs, held_out=0)
        started = time.perf_counter()
        table = FeatureTable.collect(generator, fitted.w_plus, fitted.size)
        label_generator, _ = fit_label_generator(table, fitted.targets, task, settings)
        seconds = time.perf_counter() - started
        _, accuracy = evaluate_label_generator(
            label_generator, held_out.table, held_out.targets_Q, held_out.pixels_P, task
        )
        curve.append({"epochs": epochs, "seconds": seconds, "accuracy": accuracy})
    return {"curve": curve, "before_mb": before_mb, "peak_mb": peak_mb()}


def first_to_reach(accuracy: float, curve: list[dict[str, float]]) -> dict[str, float]:
    """The first point of a curve with at least this accuracy."""
    return next(point for point in curve if point["accuracy"] >= accuracy)


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Time to equal accuracy, peak memory, and what the published training would need at its own size."""
    best = [max(point["accuracy"] for point in side["curve"]) for side in (theirs, ours)]
    reached = [first_to_reach(min(best), side["curve"]) for side in (theirs, ours)]
    steps = published.SURE_EPOCHS * PUBLISHED["pixels"] * PUBLISHED["members"] / published.BATCH_SIZE
    return {
        "accuracy": min(best),
        "published_s": reached[0]["seconds"],
        "ours_s": reached[1]["seconds"],
        "time_ratio": reached[0]["seconds"] / reached[1]["seconds"],
        "memory_ratio": theirs["peak_mb"] / ours["peak_mb"],
        "extrapolated_published": {
            **PUBLISHED,
            "matrix_gb": 4e-9 * PUBLISHED["pixels"] * PUBLISHED["channels"],
            "at_least_hours": steps / theirs["steps_per_s"] / 3600,
            "assuming": f"the steps per second measured here, on narrower hypercolumns; {published.SURE_EPOCHS} epochs",
        },
    }


def show(theirs: dict[str, Any], ours: dict[str, Any], result: dict[str, Any]) -> None:
    """Print the curves of both sides and the comparison."""
    table = Table("side", "epochs", "seconds", "accuracy", "MB before", "peak MB")
    for name, side in (("published", theirs), ("ours", ours)):
        for point in side["curve"]:
            numbers = (f"{point['epochs']}", f"{point['seconds']:,.1f}", f"{point['accuracy']:.4f}")
            table.add_row(name, *numbers, f"{side['before_mb']:,.0f}", f"{side['peak_mb']:,.0f}")
    extrapolated = result["extrapolated_published"]
    console = Console()
    console.print(table)
    console.print(
        f"accuracy {result['accuracy']:.4f}: {result['published_s']:,.1f} s published, {result['ours_s']:,.1f} s ours, "
        f"ratio {result['time_ratio']:.1f}; extrapolated to {PUBLISHED['images']} images of 512 x 512, the published "
        f"matrix takes {extrapolated['matrix_gb']:,.0f} GB and its training at least "
        f"{extrapolated['at_least_hours']:,.1f} hours on this machine"
    )


def rows(result: Result) -> list[Row]:
    """Time and memory against the published training."""
    ours, theirs = result["ours"]["peak_mb"], result["published"]["peak_mb"]
    what = f"fitting a label generator to {result['settings']['images']} images"
    accuracy = f"{result['accuracy']:.1%} of held-out pixels right"
    return [
        Row(
            f"{what}: time to {accuracy}",
            f"{result['ours_s']:.3g} s",
            f"published training: {result['published_s']:.3g} s",
            result["time_ratio"],
        ),
        Row(
            f"{what}: peak memory of the process",
            f"{ours:,.0f} MB",
            f"published training: {theirs:,.0f} MB",
            result["memory_ratio"],
        ),
    ]


def charts(result: Result) -> list[Chart]:
    """Accuracy over time, both sides in one chart."""
    sides = (("published", result["published"]), ("ours", result["ours"]))
    bars = [
        (f"{name}, {point['seconds']:.0f} s", 100 * point["accuracy"])
        for name, side in sides
        for point in side["curve"]
    ]
    return [Chart("accuracy on held-out images, %, after", bars)]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="faces", help="its generator and label generator make the images")
    parser.add_argument("--images", type=int, default=4, help="to fit")
    parser.add_argument("--held-out", type=int, default=8, help="other images, to measure accuracy on")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs=2, default=(128, 32))
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=(2, 4, 8, 16), help="one fit of this package for each number"
    )
    parser.add_argument("--published-epochs", type=int, default=4, help="at most; the published training has 4 to 100")
    args = parser.parse_args()
    theirs, ours = in_fresh_process(run_published, args), in_fresh_process(run_ours, args)
    result = compare(theirs, ours)
    show(theirs, ours, result)
    write_result("fitting", {"settings": settings(args), "published": theirs, "ours": ours, **result})


if __name__ == "__main__":
    main()
