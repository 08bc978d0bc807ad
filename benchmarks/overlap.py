"""What the stream costs a training step: training on a fixed batch, the stream alone, and training on the stream.

    python -m benchmarks.overlap --steps 10                                # CPU, ResNet-18
    python -m benchmarks.overlap --steps 100 --backbone resnet101          # on a GPU

The three parts take turns, `--rounds` times, and the median of each counts:

- training: steps of DeepLabV3 on one batch in device memory;
- generation: batches of the stream, for a consumer that does nothing;
- both: steps on the batches of the stream, on the same device.

`bubbles = both - generation - training` is what the two cost together beyond what each costs alone. They share the
arithmetic of one device: bubbles of zero mean that one runs after the other without a gap, and less than zero means
that one fills gaps of the other. On a CPU the stream and the training alternate, so the bubbles are noise and show how
large it is. `generation` and `both` use the same indices. The last line of the output is the result as JSON.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import geometries
from benchmarks.common import (
    add_stream_options,
    parser,
    result_name,
    settings,
    stream_options,
    synchronize,
    write_result,
)
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row, setting
from handsoff_stream import HandsOffStream
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.downstream import build_deeplab, train_segmentation
from handsoff_stream.downstream.deeplab import BACKBONES


def warm_stream(path: str, args: argparse.Namespace) -> Iterator[LabelledBatch]:
    """The batches of a new stream after its first, which includes loading and the slower first calls."""
    stream = HandsOffStream(path, batch_size=args.batch_size, device=args.device, **stream_options(args))
    batches: Iterator[Any] = iter(stream)
    next(batches)
    return batches


def generate(path: str, args: argparse.Namespace) -> float:
    """Seconds per step of taking batches and doing nothing with them."""
    batches, device = warm_stream(path, args), torch.device(args.device)
    synchronize(device)
    start = time.perf_counter()
    for _ in itertools.islice(batches, args.steps):
        pass
    synchronize(device)
    return (time.perf_counter() - start) / args.steps


def train(model: Any, batches: Any, args: argparse.Namespace) -> float:
    """Seconds per training step."""
    synchronize(torch.device(args.device))
    return train_segmentation(model, batches, steps=args.steps, device=args.device).seconds / args.steps


def measure(path: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of each part, one number per round."""
    head = next(iter(load_checkpoint(path).heads.values()))
    model = build_deeplab(head.task.num_outputs, backbone=args.backbone)
    batch = next(warm_stream(path, args))
    parts: dict[str, Callable[[], float]] = {
        "training": lambda: train(model, itertools.repeat(batch), args),
        "generation": lambda: generate(path, args),
        "both": lambda: train(model, warm_stream(path, args), args),
    }
    train_segmentation(model, itertools.repeat(batch), steps=1, device=args.device)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.rounds):
        for name, part in parts.items():
            seconds[name].append(part())
    return seconds


def bubbles(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds per step of each part; bubbles, their share of a step and their spread over the rounds."""
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    rounds = zip(*seconds.values(), strict=True)
    gaps = [1e3 * (both - generation - training) for training, generation, both in rounds]
    gap = statistics.median(gaps)
    return {
        **{f"{name}_ms": value for name, value in median.items()},
        "bubbles_ms": gap,
        "bubbles_share": gap / median["both"],
        "bubbles_spread_ms": max(gaps) - min(gaps),
        "slowdown": median["both"] / median["training"],
    }


def rows(result: Result) -> list[Row]:
    """The bubbles beside what training and generation take alone."""
    share, spread = result["bubbles_share"], result["bubbles_spread_ms"] / result["both_ms"]
    return [
        Row(
            f"{setting(result)}: bubbles beside DeepLabV3-{result['settings']['backbone']}",
            f"{share:+.1%} of a step of {result['both_ms']:.3g} ms (rounds within {spread:.1%})",
            f"training {result['training_ms']:.3g} ms + generation {result['generation_ms']:.3g} ms, each alone",
            None,
        )
    ]


def charts(result: Result) -> list[Chart]:
    """Milliseconds per step of each part."""
    names = {"training_ms": "training alone", "generation_ms": "generation alone", "both_ms": "both"}
    return [Chart(f"{setting(result)}: milliseconds per step", [(label, result[key]) for key, label in names.items()])]


PRESENTATION = Presentation(rows, charts)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, name="overlap")
    add_stream_options(options)
    geometries.add_arguments(options)
    options.add_argument("--backbone", choices=BACKBONES, help="default: resnet18, on CUDA resnet101")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--steps", type=int, default=5, help="of each part in each round")
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args()
    args.backbone = args.backbone or ("resnet101" if torch.device(args.device).type == "cuda" else "resnet18")
    return args


def main() -> None:
    """Measure, print a table, and write the result."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = geometries.checkpoint_path(args, Path(folder))
        seconds = measure(path, args)
        geometry = geometries.describe(load_checkpoint(path))
    result = bubbles(seconds)
    title = f"DeepLabV3 {args.backbone}, batch {args.batch_size}, {args.checkpoint}, {args.device}: a step"
    table = Table("", "ms", title=title)
    table.add_row("training alone", f"{result['training_ms']:,.1f}")
    table.add_row("generation alone", f"{result['generation_ms']:,.1f}")
    table.add_row("both", f"{result['both_ms']:,.1f}")
    spread = f"{result['bubbles_share']:+.1%} of a step; spread {result['bubbles_spread_ms']:,.1f} ms"
    table.add_row("bubbles", f"{result['bubbles_ms']:+,.1f} ({spread})")
    Console().print(table)
    write_result(result_name(args), {"settings": settings(args), "geometry": geometry, **result})


if __name__ == "__main__":
    main()
