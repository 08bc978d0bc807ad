"""Does a long stream stay flat? Memory and pairs per second in equal windows, over a number of pairs or of minutes.

    python benchmarks/memory.py --pairs 2000
    python benchmarks/memory.py --minutes 60

Each window has its own peak, of the process's resident memory and on CUDA of the allocator's. A straight line is fitted
through the windows after the first, which warms up: its slope is given with a 95 % confidence interval, and a flat
stream is one whose interval holds zero, or whose slope is too small to matter. For comparison, a fresh process makes
one pair as the published loop does. Linux only: memory is read from /proc. Last line of stdout: the result as JSON.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import geometries
import torch
from common import parser, result_name, settings, stream_options, synchronize, write_result
from published_generation import PublishedGeneration
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import load_checkpoint

MIN_POINTS = 4  # of a line whose confidence is worth giving


@dataclass(frozen=True)
class Window:
    """One of the equal parts of a run."""

    seconds: float
    pairs: int
    host_peak_mb: float
    device_peak_mb: float

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / self.seconds


@dataclass(frozen=True)
class Slope:
    """A straight line's slope a window."""

    per_window: float
    half_width: float
    """Of the 95 % interval."""

    def scaled(self, factor: float) -> dict[str, float]:
        return {"slope": self.per_window * factor, "confidence_95": self.half_width * factor}


def fit_slope(values: Sequence[float]) -> Slope:
    """Least squares through equally spaced values, `MIN_POINTS` or more; errors are taken as independent and normal."""
    count = len(values)
    slope, start = statistics.linear_regression(range(count), values)
    residual = sum((value - start - slope * x) ** 2 for x, value in enumerate(values))
    spread = (count**3 - count) / 12  # of 0 .. count - 1 about their mean, squared and summed
    return Slope(slope, student_quantile(count - 2) * math.sqrt(residual / (count - 2) / spread))


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to a percent for two degrees of freedom and exact for many.

    From the normal quantile by the expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5).
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def peak_mb() -> float:
    """Highest resident memory of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


def forget_peak() -> None:
    """Let the peak start anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def device_peak_mb(device: torch.device) -> float:
    """Highest memory of the CUDA allocator since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 1e6
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def walk(batches: Iterable[Any], windows: int, done: Callable[[int], float], device: torch.device) -> list[Window]:
    """Take batches until `done(pairs so far)` reaches 1; windows are equal in what `done` counts."""
    finished: list[Window] = []
    total, before, opened = 0, 0, time.perf_counter()
    forget_peak()
    for images, _ in batches:
        total += len(images)
        if done(total) * windows < len(finished) + 1:
            continue
        synchronize(device)
        now = time.perf_counter()
        finished.append(Window(now - opened, total - before, peak_mb(), device_peak_mb(device)))
        before, opened = total, now
        forget_peak()
        if len(finished) == windows:
            break
    return finished


def run_stream(path: str, args: argparse.Namespace) -> list[Window]:
    stream = HandsOffStream(path, batch_size=args.batch_size, device=args.device, **stream_options(args))
    loader = DataLoader(stream, batch_size=None)
    started = time.perf_counter()

    def done(pairs: int) -> float:
        if args.minutes is None:
            return pairs / args.pairs
        return (time.perf_counter() - started) / (60 * args.minutes)

    return walk(loader, args.windows, done, torch.device(args.device))


def published_peak(path: str, device: str) -> dict[str, float]:
    """Peaks of a process that makes one pair as the published loop does."""
    generate = PublishedGeneration(load_checkpoint(path), device=torch.device(device))
    generate(0)
    return {"host_peak_mb": peak_mb(), "device_peak_mb": device_peak_mb(torch.device(device))}


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def summary(windows: Sequence[Window]) -> dict[str, Any]:
    """Slopes over the windows after the first, peaks, and the whole."""
    later = windows[1:]
    seconds, pairs = sum(w.seconds for w in windows), sum(w.pairs for w in windows)
    mean_seconds, mean_pairs = statistics.fmean(w.seconds for w in later), statistics.fmean(w.pairs for w in later)
    rate = statistics.fmean(w.pairs_per_s for w in later)
    speed = fit_slope([w.pairs_per_s for w in later])
    return {
        "seconds": seconds,
        "pairs": pairs,
        "pairs_per_s": rate,
        "host_peak_mb": max(w.host_peak_mb for w in windows),
        "device_peak_mb": max(w.device_peak_mb for w in windows),
        "host_mb_per_1000_pairs": fit_slope([w.host_peak_mb for w in later]).scaled(1000 / mean_pairs),
        "device_mb_per_1000_pairs": fit_slope([w.device_peak_mb for w in later]).scaled(1000 / mean_pairs),
        "pairs_per_s_percent_per_hour": speed.scaled(100 / rate * 3600 / mean_seconds),
    }


def arguments() -> argparse.Namespace:
    options = parser(__doc__, name="memory")
    geometries.add_arguments(options)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--windows", type=int, default=10)
    length = options.add_mutually_exclusive_group()
    length.add_argument("--pairs", type=int, default=500)
    length.add_argument("--minutes", type=float, help="a soak of this length instead")
    args = options.parse_args()
    least = args.windows * args.batch_size
    if args.windows < 1 + MIN_POINTS or (args.minutes is None and args.pairs < least):
        options.error(f"pass at least {1 + MIN_POINTS} windows, and a batch for each: {least} pairs")
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = geometries.checkpoint_path(args, Path(folder))
        windows = run_stream(path, args)
        found = summary(windows)
        published = in_fresh_process(published_peak, path, args.device)
        geometry = geometries.describe(load_checkpoint(path))
    table = Table(
        "window", "s", "pairs/s", "host peak, MB", "device peak, MB", title=f"{args.checkpoint}, {args.device}"
    )
    for number, window in enumerate(windows):
        row = (window.seconds, window.pairs_per_s, window.host_peak_mb, window.device_peak_mb)
        table.add_row(str(number), *(f"{value:,.1f}" for value in row))
    Console().print(table)
    for name in ("host_mb_per_1000_pairs", "device_mb_per_1000_pairs", "pairs_per_s_percent_per_hour"):
        Console().print(f"{name}: {found[name]['slope']:+.3f} ± {found[name]['confidence_95']:.3f}")
    record = {
        "settings": settings(args),
        "geometry": geometry,
        **found,
        "published_pair": published,
        "windows": [asdict(window) for window in windows],
    }
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
