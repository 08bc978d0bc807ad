"""Labels of one image from its feature maps: the published way against the exact, the fast and the fused path.

    python benchmarks/label_head.py
    python benchmarks/label_head.py --case faces --case config-f-1024 --hidden 512 256

Each path runs in a fresh process of its own, on the same features: peak memory is the highest resident memory of its
first run above what was resident before it (on CUDA the allocator's), time the shortest of the runs after it. Errors
are against the published path: share of labels that differ, and the largest difference of the divergence; of the
members' outputs on pixels drawn at random, the largest difference, in units of their standard deviation. An ensemble
with random weights is a near tie everywhere, so its share of changed labels says little: "faces" is a trained one.
`cpu_ratio` compares processor time, which other processes on the machine disturb less; it means something with
OMP_NUM_THREADS=1. Linux only: memory is read from /proc. Last line of stdout: the result as JSON.
"""

import argparse
import ctypes
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, result_name, settings, synchronize, write_result
from geometries import HEAD, PREFIX, checkpoint_path, describe
from memory import device_peak_mb, forget_peak, peak_mb
from numpy.typing import NDArray
from published_generation import PublishedGeneration
from rich.console import Console
from rich.table import Table
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, load_checkpoint
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.synthesizer import Synthesizer

PUBLISHED = "published"
PATHS = {
    "exact": SynthesisOptions(precision="exact", kernel="torch"),
    "fast": SynthesisOptions(precision="fast", kernel="torch"),
    "fused": SynthesisOptions(precision="fast", kernel="triton"),
}
CASES = ("faces", "config-f-256")
PROBED_PIXELS = 4096
Pair = tuple[NDArray[Any], NDArray[np.float32]]
"""(label, divergence), [H, W] each."""


@dataclass(frozen=True)
class Run:
    """One path on one image."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    label_HW: NDArray[Any]
    divergence_HW: NDArray[np.float32]
    output_error: float | None
    """Largest difference of an output from the reference, in standard deviations; None if outputs are not seen."""


def run(path: str, checkpoint_file: str, device_name: str, repeats: int) -> Run:
    """Measure one path; meant for a process that has done nothing else."""
    device, checkpoint = torch.device(device_name), load_checkpoint(checkpoint_file)
    maker = Synthesizer(checkpoint, SynthesisOptions(truncation=checkpoint.truncation), device)
    _, features = maker.generate([0])
    del maker
    label = labeller(path, checkpoint, device, features)
    synchronize(device)
    device_peak_mb(device)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve what comes
    forget_peak()
    before = peak_mb()
    label_HW, divergence_HW = label()
    peak = device_peak_mb(device) if device.type == "cuda" else peak_mb() - before
    times = [clocked(label, device) for _ in range(repeats)]
    seconds, cpu_seconds = (min(column) for column in zip(*times, strict=True))
    by_outputs = path in ("exact", "fast")
    error = output_error(Synthesizer(checkpoint, PATHS[path], device), checkpoint, features) if by_outputs else None
    return Run(seconds, cpu_seconds, peak, label_HW, divergence_HW, error)


def labeller(path: str, checkpoint: Checkpoint, device: torch.device, features: FeaturePyramid) -> Callable[[], Pair]:
    """What makes (label, divergence) on the host from one image's features."""
    if path == PUBLISHED:
        published = PublishedGeneration(checkpoint, device=device)
        return lambda: published.label(features)[:2]
    synthesizer, name = Synthesizer(checkpoint, PATHS[path], device), next(iter(checkpoint.heads))

    def label() -> Pair:
        label_BHW, divergence_BHW = synthesizer.label(name, features)
        return label_BHW[0].cpu().numpy(), divergence_BHW[0].cpu().numpy()

    return label


def clocked(label: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(wall time, processor time of all threads) in seconds."""
    synchronize(device)
    start = time.perf_counter(), time.process_time()
    label()
    synchronize(device)
    return time.perf_counter() - start[0], time.process_time() - start[1]


@torch.no_grad()
def output_error(synthesizer: Synthesizer, checkpoint: Checkpoint, features: FeaturePyramid) -> float:
    """Of outputs on some pixels, against hypercolumns of those pixels through the float32 members."""
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


def in_fresh_process(*arguments: Any) -> Run:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def measure_case(case: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All paths of one checkpoint, JSON-able."""
    given = {key: getattr(args, key) if case.startswith(PREFIX) else None for key in HEAD}
    file = checkpoint_path(argparse.Namespace(checkpoint=case, **given), folder)
    paths = [PUBLISHED, *PATHS] if args.device.startswith("cuda") else [PUBLISHED, "exact", "fast"]
    runs = {}
    for path in paths:
        repeats = args.published_repeats if path == PUBLISHED else args.repeats
        runs[path] = in_fresh_process(path, file, args.device, repeats)
    return {
        "case": case,
        **describe(load_checkpoint(file)),
        "paths": {path: compare(it, runs[PUBLISHED]) for path, it in runs.items()},
    }


def compare(mine: Run, published: Run) -> dict[str, Any]:
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
    (head,) = record["heads"].values()
    title = f"{record['case']}: {head['members']} members of {head['hidden']}, labels {record['label']}"
    columns = ("s", "CPU s", "faster", "by CPU", "peak MB", "less", "changed", "divergence", "output")
    table = Table("", *columns, title=title)
    for path, it in record["paths"].items():
        error = it["output_error"]
        table.add_row(
            path,
            f"{it['seconds']:.3f}",
            f"{it['cpu_seconds']:.3f}",
            f"{it['ratio']:.1f}",
            f"{it['cpu_ratio']:.1f}",
            f"{it['peak_mb']:.0f}",
            f"{it['memory_ratio']:.1f}",
            f"{it['labels_changed']:.2e}",
            f"{it['divergence_error']:.1e}",
            "" if error is None else f"{error:.1e}",
        )
    Console(width=110).print(table)


def main() -> None:
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
    write_result(result_name(args), {"arguments": settings(args), "cases": records})


if __name__ == "__main__":
    main()
