"""The experiment: DeepLabV3 trained on the stream, against the labelled images that the stream was made from.

    python -m benchmarks.downstream --steps 300 --seeds 0 1 2

Each arm gets the same network, steps, batch size, optimiser and learning rate; all are scored on the same rendered
test faces, which no training saw.

    stream     an endless stream of synthesised pairs, with the augmentation that the labelled images get
    plain      the same pairs as they are
    labelled   the labelled images themselves, again and again, with ordinary augmentation
    mixed      half of each batch from `stream`, half from `labelled`
    judged     the stream's images, labelled by a network trained on `--judge-steps` batches of labelled renders
    rendered   fresh faces from the same source as the labelled ones, never the same twice: unlimited annotation

What `stream` lacks to `judged` is the labels' fault, what `judged` lacks to `rendered` the images', as far as the judge
is right.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors

from benchmarks.common import write_result
from benchmarks.generator import train_judge
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import read_manifest
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.device import resolve_device
from handsoff_stream.downstream import (
    RepeatedAugmented,
    SegmentationScores,
    TrainingReport,
    build_deeplab,
    evaluate,
    ordinary_augmentation,
    train_segmentation,
)
from handsoff_stream.downstream.deeplab import BACKBONES
from handsoff_stream.precision import fastest_precision
from handsoff_stream.stream import HandsOffStream

Loader = DataLoader[Any]


@dataclass(frozen=True)
class Outcome:
    """One training and its test."""

    arm: str
    seed: int
    training: TrainingReport
    scores: SegmentationScores

    def record(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "seed": self.seed,
            "seconds": round(self.training.seconds, 2),
            "seconds_waiting": round(self.training.seconds_waiting, 2),
            "last_loss": round(statistics.fmean(self.training.losses[-20:]), 4),
            "scores": self.scores.record(),
        }


class Relabelled:
    """A joint transform: the label is the judge's, then ordinary augmentation.

    Args:
        weights: file of the judge's weights.
    """

    def __init__(self, weights: str):
        self.judge = build_judge(weights)
        self.augmentation = ordinary_augmentation()

    def __call__(self, image_3HW: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            label_HW = self.judge(image_3HW[None].as_subclass(Tensor)).argmax(dim=1)[0]
        relabelled: tuple[Tensor, Tensor] = self.augmentation(image_3HW, tv_tensors.Mask(label_HW))
        return relabelled


def build_judge(weights: str) -> torch.nn.Module:
    judge = build_deeplab(len(CLASS_NAMES), backbone="resnet18")
    judge.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return judge.to(resolve_device(None)).eval()


def loader(args: argparse.Namespace, seed: int, transforms: Callable[..., Any] | None, batch: int) -> Loader:
    stream = HandsOffStream(
        args.checkpoint,
        batch_size=batch,
        seed=seed,
        truncation=args.truncation,
        precision=fastest_precision(resolve_device(None)),
        transforms=transforms,
    )
    return DataLoader(stream, batch_size=None)


def stream_loader(args: argparse.Namespace, seed: int) -> Loader:
    return loader(args, seed, ordinary_augmentation(), args.batch)


def plain_loader(args: argparse.Namespace, seed: int) -> Loader:
    return loader(args, seed, None, args.batch)


def judged_loader(args: argparse.Namespace, seed: int) -> Loader:
    return loader(args, seed, Relabelled(args.judge), args.batch)


def labelled_loader(args: argparse.Namespace, seed: int, *, batch: int | None = None) -> Loader:
    views = RepeatedAugmented(labelled_faces(args.labelled), length=args.steps * args.batch, seed=seed)
    order = torch.Generator().manual_seed(seed)
    return DataLoader(views, batch_size=batch or args.batch, shuffle=True, generator=order)


def mixed_loader(args: argparse.Namespace, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    half = args.batch // 2
    stream = loader(args, seed, ordinary_augmentation(), half)
    real = labelled_loader(args, seed, batch=args.batch - half)
    for (images, labels), (more_images, more_labels) in zip(stream, real, strict=False):
        yield torch.cat([images, more_images]), torch.cat([labels, more_labels])


def rendered_loader(args: argparse.Namespace, seed: int) -> Loader:
    # Past the labelled images, and other faces for every seed.
    num_images, first = args.steps * args.batch, args.labelled + seed * args.steps * args.batch
    faces = labelled_faces(first + num_images)
    return DataLoader(Subset(faces, range(first, first + num_images)), batch_size=args.batch)


ARMS: dict[str, Callable[[argparse.Namespace, int], Iterable[Any]]] = {
    "stream": stream_loader,
    "plain": plain_loader,
    "labelled": labelled_loader,
    "mixed": mixed_loader,
    "judged": judged_loader,
    "rendered": rendered_loader,
}


def run(args: argparse.Namespace, arm: str, seed: int) -> Outcome:
    """Train one network on one arm and score it."""
    torch.manual_seed(seed)  # dropout
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = build_deeplab(len(CLASS_NAMES), backbone=args.backbone, pretrained_backbone=args.pretrained, seed=seed)
    training = train_segmentation(
        model,
        ARMS[arm](args, seed),
        steps=args.steps,
        lr=args.lr,
        schedule=args.schedule,
        warmup=args.warmup,
        dtype=dtype,
    )
    scores = evaluate(model, RenderedFaces("test", num_images=args.test_images), CLASS_NAMES, dtype=dtype)
    return Outcome(arm, seed, training, scores)


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Mean and spread over the seeds, for each arm."""
    rows: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(o.arm for o in outcomes):
        mine = [o for o in outcomes if o.arm == arm]
        mious = [o.scores.miou for o in mine]
        rows[arm] = {
            "miou_mean": statistics.fmean(mious),
            "miou_std": statistics.stdev(mious) if len(mious) > 1 else None,
            "pixel_accuracy_mean": statistics.fmean(o.scores.pixel_accuracy for o in mine),
            "seconds_mean": statistics.fmean(o.training.seconds for o in mine),
            "seconds_waiting_mean": statistics.fmean(o.training.seconds_waiting for o in mine),
        }
    return rows


def table(args: argparse.Namespace, outcomes: list[Outcome]) -> Table:
    """One column an arm: mIoU, IoU of each class (means over the seeds), seconds."""
    rows = summary(outcomes)
    seeds = len(args.seeds)
    shown = Table("", *rows, title=f"{args.steps} steps of {args.batch}, {args.backbone}, {seeds} seed(s)")
    spread = [f" ± {r['miou_std']:.3f}" if r["miou_std"] is not None else "" for r in rows.values()]
    shown.add_row(
        "mIoU", *(f"{r['miou_mean']:.3f}{s}" for r, s in zip(rows.values(), spread, strict=True)), end_section=True
    )
    for k, name in enumerate(CLASS_NAMES):
        ious = [[o.scores.iou_per_class[k] for o in outcomes if o.arm == arm] for arm in rows]
        shown.add_row(name, *(f"{statistics.fmean(v):.3f}" for v in ious), end_section=k == len(CLASS_NAMES) - 1)
    shown.add_row("training, s", *(f"{r['seconds_mean']:.0f}" for r in rows.values()))
    shown.add_row("of it waiting for data, s", *(f"{r['seconds_waiting_mean']:.0f}" for r in rows.values()))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--checkpoint", default="faces", help="name or path, for all arms but `labelled` and `rendered`"
    )
    parser.add_argument("--truncation", type=float, help="psi of the stream; default: the checkpoint's")
    parser.add_argument("--labelled", type=int, default=16, help="labelled images the checkpoint was fitted on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--judge-steps", type=int, default=1000, help="steps that the judge of the arm `judged` trains")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet18")
    parser.add_argument("--pretrained", action="store_true", help="start from cached ImageNet weights")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; CUDA: bfloat16")
    parser.add_argument(
        "--processes", type=int, default=1, help="trainings at once, which share the cores and, on a GPU, the device"
    )
    parser.add_argument("--name", default="downstream", help="of the result file")
    return parser.parse_args()


def train(args: argparse.Namespace, console: Console) -> list[Outcome]:
    """Every arm with every seed."""
    threads = max(1, torch.get_num_threads() // args.processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, torch.set_num_threads, (threads,)) as pool:
        trainings = [pool.submit(run, args, arm, seed) for seed in args.seeds for arm in args.arms]
        with console.status(f"{len(trainings)} trainings of {args.steps} steps"):
            for training in as_completed(trainings):
                done = training.result()
                seconds = done.training.seconds
                console.print(f"{done.arm}, seed {done.seed}: mIoU {done.scores.miou:.3f} in {seconds:.0f} s")
        return [training.result() for training in trainings]


def train_and_save_judge(args: argparse.Namespace) -> SegmentationScores:
    """Writes the weights to `args.judge`; returns the judge's scores on test renders."""
    size = read_manifest(args.checkpoint)["output_size"][0]
    judge = train_judge(size, args.judge_steps, resolve_device(None))
    torch.save(judge.state_dict(), args.judge)
    return evaluate(judge, RenderedFaces("test", num_images=args.test_images), CLASS_NAMES)


ARM_NAMES = {
    "stream": "the stream",
    "plain": "the stream without augmentation",
    "labelled": "the labelled images",
    "mixed": "half stream, half labelled images",
    "judged": "the stream's images, labelled by a network trained on renders",
    "rendered": "unlimited labelled images",
}


def rows(result: Result) -> list[Row]:
    """The stream, or the first arm if there is no stream, against every other arm."""
    settings, arms = result["settings"], result["summary"]
    what = f"mIoU of DeepLabV3-{settings['backbone']}, {settings['steps']} steps, {len(settings['seeds'])} seed(s)"
    first, *others = sorted(arms, key=lambda name: name != "stream")
    return [
        Row(f"{what}: {ARM_NAMES[first]}", _miou(arms[first]), f"{ARM_NAMES[name]}: {_miou(arms[name])}", None)
        for name in others
    ]


def _miou(arm: dict[str, Any]) -> str:
    spread = arm["miou_std"]
    return f"{arm['miou_mean']:.1%}" + ("" if spread is None else f" ± {spread:.1%}")


def charts(result: Result) -> list[Chart]:
    """The mIoU of every arm."""
    return [Chart("mIoU, %", [(name, 100 * arm["miou_mean"]) for name, arm in result["summary"].items()])]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    args = arguments()
    console = Console(stderr=True)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.judge = f"{folder}/judge.pt"
        if "judged" in args.arms:
            scores = train_and_save_judge(args)
            console.print(f"judge: mIoU {scores.miou:.3f}")
            result["judge_on_renders"] = scores.record()
        outcomes = train(args, console)
    Console().print(table(args, outcomes))
    settings = {k: v for k, v in vars(args).items() if k != "judge"} | {"checkpoint": Path(args.checkpoint).name}
    if {"stream", "plain", "mixed", "judged"} & set(args.arms):
        settings["fingerprint"] = read_manifest(args.checkpoint)["fingerprint"]
    runs = [outcome.record() for outcome in outcomes]
    write_result(args.name, {"settings": settings, "summary": summary(outcomes), "runs": runs, **result})


if __name__ == "__main__":
    main()
