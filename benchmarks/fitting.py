"""Fitting a label generator: time to equal accuracy and peak memory, against the published training.

    python benchmarks/fitting.py --images 8

Images that the checkpoint's generator makes, labelled by the checkpoint's own label generator, are learnt from scratch
by both sides, each in a process of its own, one after the other. Accuracy is the share of pixels that the ensemble
labels right in other images of the same kind.

The published training (`published_fitting.py`) is looked at after each of its epochs: an ensemble of k epochs exists
when all members have had k. Small sets would keep it busy for up to 100, so it is cut off after `--published-epochs`.
Ours is fitted anew for each number of epochs, from the latents on. Compared are the times of the first look that
reached the lower of the two sides' best accuracies.

Peak memory is that of the process, the interpreter with PyTorch included; Linux only. What the published training would
need at its own size is extrapolated, and named so; `fitting_memory.py` measures ours there. Last line of stdout: the
result as JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import published_fitting as published
import torch
from common import write_result
from memory import forget_peak, peak_mb
from rich.console import Console
from rich.table import Table
from torch import Tensor

from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.features import Size
from handsoff_stream.fitting import FeatureTable, FitSettings, fit_label_generator
from handsoff_stream.fitting.fit import evaluate_label_generator
from handsoff_stream.generators import Generator
from handsoff_stream.seeding import latents
from handsoff_stream.tasks import Task
from handsoff_stream.uncertainty import majority_vote

EVALUATED_PIXELS = 20_000
PUBLISHED = {"images": 50, "pixels": 50 * 512 * 512, "channels": 6080, "members": 10}


class Labelled(NamedTuple):
    """Images of a generator: w+ float32 [N, L, D], labels int64 [N, H, W]."""

    w_plus: Tensor
    targets: Tensor

    @property
    def size(self) -> Size:
        return self.targets.shape[1], self.targets.shape[2]


@torch.no_grad()
def label_samples(name: str, first: int, count: int) -> tuple[Generator, Task, Labelled]:
    """The checkpoint's generator and task, and `count` of its samples, labelled by its own label generator."""
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


class Judge:
    """Accuracy on some pixels of images that nobody is fitted to."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator, self.task, held_out = label_samples(args.checkpoint, args.images, args.held_out)
        self.table = FeatureTable.collect(generator, held_out.w_plus, held_out.size)
        self.targets_Q = held_out.targets.flatten()
        count, random = min(EVALUATED_PIXELS, len(self.targets_Q)), torch.Generator().manual_seed(0)
        self.pixels_P = torch.randperm(len(self.targets_Q), generator=random)[:count]

    @torch.no_grad()
    def votes(self, member: Callable[[Tensor], Tensor]) -> Tensor:
        """Ids, int64 [P], that one member chooses."""
        return torch.cat([member(self.table.rows(chunk)).argmax(dim=1) for chunk in self.pixels_P.split(2048)])

    def accuracy_of_votes(self, votes_MP: Tensor) -> float:
        right_P = majority_vote(votes_MP, self.task.num_outputs) == self.targets_Q[self.pixels_P]
        return right_P.float().mean().item()


def run_published(args: argparse.Namespace) -> dict[str, Any]:
    judge = Judge(args)
    generator, task, fitted = label_samples(args.checkpoint, 0, args.images)
    forget_peak()
    before_mb, started = peak_mb(), time.perf_counter()
    rows_QC = published.hypercolumn_matrix(generator, fitted.w_plus, fitted.size)
    features_s = time.perf_counter() - started
    votes_M: list[list[Tensor]] = []  # of each look
    seconds_M: list[list[float]] = []
    steps = 0
    for m in range(args.members):
        random = torch.Generator().manual_seed(m)
        member = published.make_member(rows_QC.shape[1], tuple(args.hidden), task.num_outputs, random)
        targets_Q = fitted.targets.flatten()
        training = published.train_member(member, rows_QC, targets_Q, random, max_epochs=args.published_epochs)
        looks = [(judge.votes(member), steps_m, seconds) for steps_m, seconds in training]
        votes_M.append([votes for votes, _, _ in looks])
        seconds_M.append([seconds for _, _, seconds in looks])
        steps += looks[-1][1]
    curve = []
    for look in range(max(map(len, seconds_M))):  # a member that has ended stays as it is
        seconds = features_s + sum(each[: look + 1][-1] for each in seconds_M)
        votes_MP = torch.stack([votes[: look + 1][-1] for votes in votes_M])
        curve.append({"epochs": look + 1, "seconds": seconds, "accuracy": judge.accuracy_of_votes(votes_MP)})
    return {
        "curve": curve,
        "before_mb": before_mb,
        "peak_mb": peak_mb(),
        "matrix_mb": rows_QC.nbytes / 1e6,
        "steps": steps,
        "steps_per_s": steps / sum(each[-1] for each in seconds_M),
    }


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    judge = Judge(args)
    generator, task, fitted = label_samples(args.checkpoint, 0, args.images)
    forget_peak()
    before_mb = peak_mb()
    curve = []
    for epochs in args.epochs:
        settings = FitSettings(hidden=tuple(args.hidden), members=args.members, epochs=epochs, held_out=0)
        started = time.perf_counter()
        table = FeatureTable.collect(generator, fitted.w_plus, fitted.size)
        label_generator, _ = fit_label_generator(table, fitted.targets, task, settings)
        seconds = time.perf_counter() - started
        _, accuracy = evaluate_label_generator(label_generator, judge.table, judge.targets_Q, judge.pixels_P, task)
        curve.append({"epochs": epochs, "seconds": seconds, "accuracy": accuracy})
    return {"curve": curve, "before_mb": before_mb, "peak_mb": peak_mb()}


def in_own_process(side: str) -> dict[str, Any]:
    """What `--side` prints as its last line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def first_to_reach(accuracy: float, curve: list[dict[str, float]]) -> dict[str, float]:
    return next(look for look in curve if look["accuracy"] >= accuracy)


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Time to equal accuracy and peak memory, with the published training's needs at its own size."""
    best = [max(look["accuracy"] for look in side["curve"]) for side in (theirs, ours)]
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
            "assuming": "the steps per second measured here, on narrower hypercolumns; four epochs",
        },
    }


def show(theirs: dict[str, Any], ours: dict[str, Any], result: dict[str, Any]) -> None:
    table = Table("side", "epochs", "seconds", "accuracy", "MB before", "peak MB")
    for name, side in (("published", theirs), ("ours", ours)):
        for look in side["curve"]:
            numbers = (f"{look['epochs']}", f"{look['seconds']:,.1f}", f"{look['accuracy']:.4f}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="faces", help="whose generator and label generator make the images")
    parser.add_argument("--images", type=int, default=4, help="to fit")
    parser.add_argument("--held-out", type=int, default=8, help="other images, to measure accuracy on")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs=2, default=(128, 32))
    parser.add_argument("--epochs", type=int, nargs="+", default=(2, 4, 8, 16), help="of ours, one fit each")
    parser.add_argument("--published-epochs", type=int, default=4, help="at most; the published training has 4 to 100")
    parser.add_argument("--side", choices=SIDES, help="run one side alone, and print what it measured")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    theirs, ours = in_own_process("published"), in_own_process("ours")
    result = compare(theirs, ours)
    show(theirs, ours, result)
    settings = {key: value for key, value in vars(args).items() if key != "side"}
    write_result("fitting", {"settings": settings, "published": theirs, "ours": ours, **result})


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"published": run_published, "ours": run_ours}


if __name__ == "__main__":
    main()
