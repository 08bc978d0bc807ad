"""Labels of one image from its feature maps: the published way against the exact, the fast and the fused path.

    python -m benchmarks.label_head
    python -m benchmarks.label_head --case faces --case config-f-1024 --hidden 512 256

Each path runs in a fresh process, on the same features. Peak memory is the highest resident memory of its first run
above what was resident before (on CUDA, the allocator's memory); time is the shortest of the later runs.

Errors are differences from the published path: the share of changed labels, and the largest difference of the
divergence. The error of the outputs is the largest difference, on random pixels, from the float32 members on those
pixels' hypercolumns, in standard deviations of the outputs. In an ensemble with random weights almost every vote is
close to a tie, so its share of changed labels says little; "faces" is trained.

`cpu_ratio` compares processor time, which other processes on the machine disturb less; it is meaningful with
OMP_NUM_THREADS=1. Linux only. The last line of the output is the result as JSON.
"""

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import parser, result_name, settings, short_path, synchronize, write_result
from benchmarks.geometries import HEAD, PREFIX, checkpoint_path, describe
from benchmarks.processes import device_peak_mb, in_fresh_process, peak_mb, reset_peak
from benchmarks.reference.published_generation import PublishedGeneration
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.precision import cpu_multiplies_bfloat16
from handsoff_stream.synthesizer import Synthesizer

PUBLISHED = "published"
PATHS = {
    "exact": SynthesisOptions(precision="exact", kernel="torch"),
    "fast": SynthesisOptions(precision="fast", kernel="torch"),
    "fused": SynthesisOptions(precision="fast", kernel="triton"),
}
CPU_PATHS = ("exact", "fast") if cpu_multiplies_bfloat16() else ("exact",)
CASES = ("faces", "config-f-256")
PROBED_PIXELS = 4096
HEADLINE = ("config-f-1024", "exact")
"""README.md shows the path without rounding, at the largest size."""
Pair = tuple[NDArray[Any], NDArray[np.float32]]
"""Label, class ids [H, W], and Jensen-Shannon divergence, float32 [H, W] in nats."""


@dataclass(frozen=True)
class Run:
    """One path on one image."""

    seconds: float
    cpu_seconds: float
    """Processor time of all threads."""
    peak_mb: float
    """Above what was resident before the run."""
    label_HW: NDArray[Any]
    divergence_HW: NDArray[np.float32]
    output_error: float | None
    """Largest difference of an output from the reference, in standard deviations; None if the path hides outputs."""


def run(path: str, checkpoint_file: str, device_name: str, repeats: int) -> Run:
    """Measure one path; meant for a fresh process."""
    device, checkpoint = torch.device(device_name), load_checkpoint(checkpoint_file)
    maker = Synthesizer(checkpoint, SynthesisOptions(truncation=checkpoint.truncation), device)
    _, features = maker.generate([0])
    del maker
    label = label_function(path, checkpoint, device, features)
    synchronize(device)
    device_peak_mb(device)
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that the run's allocations show
    reset_peak()
    before = peak_mb()
    label_HW, divergence_HW = label()
    peak = device_peak_mb(device) if device.type == "cuda" else peak_mb() - before
    times = [clocked(label, device) for _ in range(repeats)]
    seconds, cpu_seconds = (min(column) for column in zip(*times, strict=True))
    by_outputs = path in ("exact", "fast")
    error = output_error(Synthesizer(checkpoint, PATHS[path], device), checkpoint, features) if by_outputs else None
    return Run(seconds, cpu_seconds, peak, label_HW, divergence_HW, error)


def label_function(
    path: str, checkpoint: Checkpoint, device: torch.device, features: FeaturePyramid
) -> Callable[[], Pair]:
    """A function that labels one image from its features, by one path, and returns the result on the host."""
    if path == PUBLISHED:
        published = PublishedGeneration(checkpoint, device=device)
        return lambda: published.label(features)[:2]
    synthesizer, name = Synthesizer(checkpoint, PATHS[path], device), next(iter(checkpoint.heads))

    def label() -> Pair:
        label_BHW, divergence_BHW = synthesizer.label(name, features)
        return label_BHW[0].cpu().numpy(), divergence_BHW[0].cpu().numpy()

    return label


def clocked(label: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall time, and processor time of all threads, in seconds."""
    synchronize(device)
    start = time.perf_counter(), time.process_time()
    label()
    synchronize(device)
    return time.perf_counter() - start[0], time.process_time() - start[1]


@torch.no_grad()
def output_error(synthesizer: Synthesizer, checkpoint: Checkpoint, features: FeaturePyramid) -> float:
    """Largest error of the outputs on `PROBED_PIXELS` random pixels, in standard deviations of the outputs.

    The reference is the float32 members on the hypercolumns of those pixels.
    """
    height, width = checkpoint.size
    name = next(iter(checkpoint.heads))
    generator = torch.Generator().manual_seed(0)
    pixels_P = torch.randint(height * width, (PROBED_PIXELS,), generator=generator).to(features.device)
    expected_MPK = checkpoint.heads[name].label_generator(features.rows_at(pixels_P, checkpoint.size))
    probed: list[Tensor] = []
    order: list[Tensor] = []
    for rows, outputs_MPK in synthesizer.labeller.folded[name].tiles(features, checkpoint.size):
        here = (pixels_P >= rows.start * width) & (pixels_P < rows.stop * width)
        probed.append(outputs_MPK[:, pixels_P[here] - rows.start * width])
        order.append(here.nonzero()[:, 0])
    difference = torch.cat(probed, dim=1) - expected_MPK[:, torch.cat(order)]
    return float(difference.abs().max() / expected_MPK.std())


def measure_case(case: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All paths on one checkpoint, JSON-able."""
    given = {key: getattr(args, key) if case.startswith(PREFIX) else None for key in HEAD}
    file = checkpoint_path(argparse.Namespace(checkpoint=case, **given), folder)
    paths = [PUBLISHED, *PATHS] if args.device.startswith("cuda") else [PUBLISHED, *CPU_PATHS]
    runs = {}
    for path in paths:
        repeats = args.published_repeats if path == PUBLISHED else args.repeats
        runs[path] = in_fresh_process(run, path, file, args.device, repeats)
    return {
        "case": short_path(case),
        **describe(load_checkpoint(file)),
        "paths": {path: compare(measured, runs[PUBLISHED]) for path, measured in runs.items()},
    }


def compare(mine: Run, published: Run) -> dict[str, Any]:
    """The numbers of one run, and its ratios to and differences from the published path, JSON-able."""
    numbers = {key: value for key, value in asdict(mine).items() if not isinstance(value, np.ndarray)}
    return {
        **numbers,
        "ratio": published.seconds / mine.seconds,
        "cpu_ratio": published.cpu_seconds / mine.cpu_seconds,
        "memory_ratio": published.peak_mb / mine.peak_mb,
        "labels_changed": float((mine.label_HW != published.label_HW).mean()),
        "divergence_error": float(np.abs(mine.divergence_HW - published.divergence_HW).max()),
    }


def show(record: dict[str, Any]) -> None:
    """Print the table of one case."""
    (head,) = record["heads"].values()
    title = f"{record['case']}: {head['members']} members of {head['hidden']}, labels {record['label']}"
    columns = ("s", "CPU s", "faster", "by CPU", "peak MB", "less", "changed", "divergence", "output")
    table = Table("", *columns, title=title)
    for path, measured in record["paths"].items():
        error = measured["output_error"]
        table.add_row(
            path,
            f"{measured['seconds']:.3f}",
            f"{measured['cpu_seconds']:.3f}",
            f"{measured['ratio']:.1f}",
            f"{measured['cpu_ratio']:.1f}",
            f"{measured['peak_mb']:.0f}",
            f"{measured['memory_ratio']:.1f}",
            f"{measured['labels_changed']:.2e}",
            f"{measured['divergence_error']:.1e}",
            "" if error is None else f"{error:.1e}",
        )
    Console(width=110).print(table)


def rows(result: Result) -> list[Row]:
    """Every path of every case against the published one."""
    return [row for case in result["cases"] for row in _rows_of_case(case)]


def _rows_of_case(case: Result) -> list[Row]:
    (head,), (height, width), paths = case["heads"].values(), case["label"], case["paths"]
    what = f"{case['case']}, {height} x {width}, {head['members']} members of {tuple(head['hidden'])}: label head"
    theirs = paths[PUBLISHED]
    other = f"published label path: {theirs['seconds']:.3g} s, {theirs['peak_mb']:,.0f} MB"
    return [
        Row(
            f"{what}, {name}",
            f"{ours['seconds']:.3g} s, {ours['peak_mb']:,.0f} MB, {ours['labels_changed']:.2%} of labels changed",
            other,
            ours["ratio"],
            (case["case"], name) == HEADLINE,
        )
        for name, ours in paths.items()
        if name != PUBLISHED
    ]


def charts(result: Result) -> list[Chart]:
    """Seconds per image of each path, one chart per case."""
    return [
        Chart(
            f"{case['case']}: seconds to label one image",
            [(name, path["seconds"]) for name, path in case["paths"].items()],
        )
        for case in result["cases"]
    ]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    """Measure, print a table, and write the result."""
    options = parser(__doc__, name="label_head")
    options.add_argument("--case", action="append", help=f'checkpoint, path, or "config-f-R"; default: {CASES}')
    options.add_argument("--hidden", type=int, nargs=2, help="widths of heads with random weights (default: 256 32)")
    options.add_argument("--members", type=int, help="of heads with random weights (default: 10)")
    options.add_argument("--classes", type=int, help="of heads with random weights (default: 19)")
    options.add_argument("--repeats", type=int, default=3, help="timed runs of our paths")
    options.add_argument("--published-repeats", type=int, default=1, help="timed runs of the published one")
    args = options.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.case or CASES:
            records.append(measure_case(case, args, Path(folder)))
            show(records[-1])
    write_result(result_name(args), {"settings": settings(args), "cases": records})


if __name__ == "__main__":
    main()
