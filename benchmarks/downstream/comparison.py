"""The main benchmark: which share of the gap between few and unlimited labels does the stream close?

    python -m benchmarks.downstream --steps 1000 --seeds 0 1 2
    python -m benchmarks.downstream --steps 1000 --seeds 0 1 2 --from-scratch --name downstream-scratch
    python -m benchmarks.downstream --arms labelled unlimited --classes fine --varied --name downstream-gap

Each arm gets the same network, steps, batch size, optimizer, learning rate and augmentation. Every network is scored
once, at the end, on the same rendered test faces, which no training saw. Settings are chosen on validation faces only
(`--curve`).

    transfer              the labelled images; the ImageNet backbone is frozen and only the head is trained
    labelled              the labelled images; the whole network is fine-tuned: the strong baseline
    stream                an endless stream of synthesized pairs
    mixed                 half of each batch from `stream`, half from `labelled`
    stream-then-labelled  `stream` for four fifths of the steps, then `labelled` at a tenth of the learning rate
    datasetgan            like `stream`, but the label generator is fitted on samples of the same generator, as many as
                          there are labelled images; the teacher labels them
    teacher-labelled      the stream's images, labelled by the teacher
    unlimited             fresh faces from the source of the labelled ones, none of them twice

    gap closed = (arm - labelled) / (unlimited - labelled), for each seed

A checkpoint that was fitted with a teacher is compared like any other: `--checkpoint` takes that of `fit --teacher`, of
`recipes.faces.fit_faces --taught-samples`, or of `benchmarks.sample_labels`. That teacher learns from the labelled
images; the teacher of this benchmark stands for a person.

The teacher is a segmentation network trained on `--teacher-steps` batches of unlimited labelled renders. As far as the
teacher is right, the difference between `stream` and `teacher-labelled` measures errors of the stream's labels, and the
difference between `teacher-labelled` and `unlimited` measures flaws of its images. Arms with a stream are compared in
the classes that the checkpoint was fitted on.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_result
from benchmarks.downstream.arms import ARMS, Outcome, run
from benchmarks.downstream.batches import MOST_LABELLED, Experiment, class_names_of, fingerprint
from benchmarks.downstream.teacher import fit_on_samples, train_teacher
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, FINE_CLASS_NAMES
from handsoff_stream.downstream.deeplab import BACKBONES

CLASSES = {"coarse": CLASS_NAMES, "fine": FINE_CLASS_NAMES}


def gap_closed(outcomes: list[Outcome]) -> dict[str, dict[int, float]]:
    """Arm => seed => share of the gap; empty unless `labelled` and `unlimited` were trained with that seed.

    A seed for which unlimited annotation is no better than the labelled images has no gap, and is left out.
    """
    miou = {(o.arm, o.seed): o.scores.miou for o in outcomes}
    shares: dict[str, dict[int, float]] = {}
    for (arm, seed), value in miou.items():
        low, high = miou.get(("labelled", seed), math.nan), miou.get(("unlimited", seed), math.nan)
        if high > low:
            shares.setdefault(arm, {})[seed] = (value - low) / (high - low)
    return shares


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the seeds, for each arm."""
    rows: dict[str, dict[str, Any]] = {}
    shares = gap_closed(outcomes)
    for arm in dict.fromkeys(o.arm for o in outcomes):
        mine = [o for o in outcomes if o.arm == arm]
        mious = [o.scores.miou for o in mine]
        closed = shares.get(arm, {})
        rows[arm] = {
            "miou_mean": statistics.fmean(mious),
            "miou_std": statistics.stdev(mious) if len(mious) > 1 else None,
            "gap_closed_mean": statistics.fmean(closed.values()) if closed else None,
            "gap_closed": {str(seed): share for seed, share in closed.items()},
            "pixel_accuracy_mean": statistics.fmean(o.scores.pixel_accuracy for o in mine),
            "seconds_mean": statistics.fmean(o.seconds for o in mine),
            "seconds_waiting_mean": statistics.fmean(o.seconds_waiting for o in mine),
        }
    return rows


def table(experiment: Experiment, outcomes: list[Outcome]) -> Table:
    """One column per arm: mIoU, gap closed, IoU of each class (means over the seeds), seconds."""
    rows = summary(outcomes)
    seeds = len({o.seed for o in outcomes})
    weights = "ImageNet" if experiment.pretrained else "from scratch"
    title = f"{experiment.steps} steps of {experiment.batch}, {experiment.backbone} ({weights}), {seeds} seed(s)"
    shown = Table("", *rows, title=title)
    spread = [f" ± {r['miou_std']:.3f}" if r["miou_std"] is not None else "" for r in rows.values()]
    shown.add_row("mIoU", *(f"{r['miou_mean']:.3f}{s}" for r, s in zip(rows.values(), spread, strict=True)))
    closed = [r["gap_closed_mean"] for r in rows.values()]
    shown.add_row("gap closed", *("" if share is None else f"{share:.0%}" for share in closed), end_section=True)
    last = len(experiment.class_names) - 1
    for k, name in enumerate(experiment.class_names):
        ious = [_mean([o.scores.iou_per_class[k] for o in outcomes if o.arm == arm]) for arm in rows]
        shown.add_row(name, *(f"{iou:.3f}" for iou in ious), end_section=k == last)
    shown.add_row("training, s", *(f"{r['seconds_mean']:.0f}" for r in rows.values()))
    shown.add_row("of it waiting for data, s", *(f"{r['seconds_waiting_mean']:.0f}" for r in rows.values()))
    return shown


def _mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; the IoU of an absent class is NaN."""
    there = [value for value in values if value == value]
    return statistics.fmean(there) if there else math.nan


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm != "teacher-labelled"])
    parser.add_argument("--checkpoint", default="faces", help="name or path; used by the arms with a stream")
    parser.add_argument("--truncation", type=float, help="psi of the stream; default: the checkpoint's")
    parser.add_argument("--classes", choices=CLASSES, help="for arms without a stream; default: the checkpoint's")
    parser.add_argument("--labelled", type=int, default=16, help=f"labelled images, at most {MOST_LABELLED}")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels, as of the checkpoint")
    parser.add_argument(
        "--varied", action="store_true", help="varied faces, for a checkpoint whose generator draws them"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--teacher-steps", type=int, default=1000, help="training steps of the teacher")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--validation-images", type=int, default=100)
    parser.add_argument("--curve", type=int, nargs="+", default=[], help="steps after which validation is scored")
    parser.add_argument("--backbone", choices=BACKBONES, default="efficientnet-lite0")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights, not from ImageNet's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where it is fast")
    parser.add_argument(
        "--processes", type=int, default=1, help="trainings at once, which share the cores and, on a GPU, the device"
    )
    parser.add_argument("--name", default="downstream", help="name of the result file")
    args = parser.parse_args()
    if not 1 <= args.labelled <= MOST_LABELLED:
        parser.error(f"--labelled {args.labelled}: there are 1 to {MOST_LABELLED} labelled faces to choose from")
    if args.from_scratch and "transfer" in args.arms:
        args.arms.remove("transfer")  # nobody would freeze a backbone of random weights
    return args


def experiment_of(args: argparse.Namespace, folder: str) -> Experiment:
    """What is compared.

    Raises:
        ValueError: the checkpoint labels other classes than `--classes`.
    """
    streams = any(ARMS[arm].needs for arm in args.arms)
    names = class_names_of(args.checkpoint) if streams or args.classes is None else CLASSES[args.classes]
    if args.classes is not None and names != CLASSES[args.classes]:
        raise ValueError(
            f"--classes {args.classes}, but {args.checkpoint} labels {len(names)} classes, so its stream cannot be "
            "compared; leave --classes out, or pass a checkpoint with those classes"
        )
    shared = {key: value for key, value in vars(args).items() if key in Experiment.__dataclass_fields__}
    return Experiment(
        **shared | {"curve": tuple(args.curve)},
        class_names=names,
        pretrained=not args.from_scratch,
        teacher=f"{folder}/teacher.pt",
        sampled=f"{folder}/sampled.safetensors",
    )


def train(args: argparse.Namespace, experiment: Experiment, console: Console) -> list[Outcome]:
    """Every arm with every seed."""
    threads = max(1, torch.get_num_threads() // args.processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, torch.set_num_threads, (threads,)) as pool:
        trainings = [pool.submit(run, experiment, arm, seed) for seed in args.seeds for arm in args.arms]
        with console.status(f"{len(trainings)} trainings of {args.steps} steps"):
            for training in as_completed(trainings):
                done = training.result()
                console.print(f"{done.arm}, seed {done.seed}: mIoU {done.scores.miou:.3f} in {done.seconds:.0f} s")
        return [training.result() for training in trainings]


ARM_NAMES = {
    "transfer": "the labelled images, backbone frozen",
    "labelled": "the labelled images",
    "stream": "the stream",
    "mixed": "half stream, half labelled images",
    "stream-then-labelled": "the stream, then the labelled images",
    "datasetgan": "a stream from labelled samples",
    "teacher-labelled": "the stream's images, labelled by a network trained on renders",
    "unlimited": "unlimited labelled images",
    # Names of arms in result files written before November 26, 2026:
    "judged": "the stream's images, labelled by a network trained on renders",
    "plain": "the stream without augmentation",
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
    """Train and score every arm with every seed, print a table, and write the result."""
    args = arguments()
    console = Console(stderr=True)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_of(args, folder)
        if any(ARMS[arm].needs == "teacher" for arm in args.arms):
            teacher = train_teacher(experiment, args.teacher_steps)
            console.print(f"teacher: mIoU {teacher.miou:.3f} on validation renders")
            result["judge_on_validation_renders"] = teacher.record()
        if "datasetgan" in args.arms:
            fit_on_samples(experiment)
        outcomes = train(args, experiment, console)
    Console().print(table(experiment, outcomes))
    settings = vars(args) | {"checkpoint": Path(args.checkpoint).name, "class_names": list(experiment.class_names)}
    if any(ARMS[arm].needs for arm in args.arms):
        settings["fingerprint"] = fingerprint(args.checkpoint)
    runs = [outcome.record() for outcome in outcomes]
    write_result(args.name, {"settings": settings, "summary": summary(outcomes), "runs": runs, **result})
