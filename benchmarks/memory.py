"""Memory and pairs per second of a long stream, in equal windows, over a number of pairs or of minutes.

    python -m benchmarks.memory --pairs 2000
    python -m benchmarks.memory --minutes 60

Each window has its own peak of the process's resident memory, and on CUDA of the allocator's memory. The first window
warms up; a straight line is fitted through the others. Its slope is given with a 95 % confidence interval: the stream
does not grow if the interval holds zero, or if the slope is too small to matter. For comparison, a fresh process makes
one pair with the published loop. Linux only. The last line of the output is the result as JSON.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

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
from benchmarks.processes import device_peak_mb, in_fresh_process, peak_mb, reset_peak
from benchmarks.reference.published_generation import PublishedGeneration
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row, setting
from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import load_checkpoint

MIN_POINTS = 4
"""Fewest windows that a line is fitted through."""
MIN_SECONDS_FOR_RATE = 1200
"""A shorter run says too little about an hour to report the change of its throughput."""


@dataclass(frozen=True)
class Window:
    """One of the equal parts of a run; peaks are in MB."""

    seconds: float
    pairs: int
    host_peak_mb: float
    device_peak_mb: float

    @property
    def pairs_per_s(self) -> float:
        """Pairs per second."""
        return self.pairs / self.seconds


@dataclass(frozen=True)
class Slope:
    """The slope of a straight line through one value per window."""

    per_window: float
    half_width: float
    """Half the width of the 95 % confidence interval."""

    def scaled(self, factor: float) -> dict[str, float]:
        """Slope and confidence in another unit, JSON-able."""
        return {"slope": self.per_window * factor, "confidence_95": self.half_width * factor}


def fit_slope(values: Sequence[float]) -> Slope:
    """Least squares through at least `MIN_POINTS` equally spaced values; errors are taken as independent and normal."""
    count = len(values)
    slope, start = statistics.linear_regression(range(count), values)
    residual = sum((value - start - slope * x) ** 2 for x, value in enumerate(values))
    spread = (count**3 - count) / 12  # sum of the squared distances of 0 .. count - 1 from their mean
    return Slope(slope, student_quantile(count - 2) * math.sqrt(residual / (count - 2) / spread))


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution with `freedom` degrees of freedom, at least 2.

    Computed from the normal quantile by the expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5); the error is
    below one percent for two degrees of freedom and vanishes for many.
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


def measure_windows(
    batches: Iterable[Any], windows: int, progress: Callable[[int], float], device: torch.device
) -> list[Window]:
    """Take batches, and measure each of `windows` equal parts of the way.

    Args:
        batches: tuples whose first entry is the images of a batch.
        windows: number of parts.
        progress: from the number of pairs so far to the finished share of the run; at 1 the run ends.
        device: where the batches are made.
    """
    finished: list[Window] = []
    total, before, opened = 0, 0, time.perf_counter()
    reset_peak()
    for images, _ in batches:
        total += len(images)
        if progress(total) * windows < len(finished) + 1:
            continue
        synchronize(device)
        now = time.perf_counter()
        finished.append(Window(now - opened, total - before, peak_mb(), device_peak_mb(device)))
        before, opened = total, now
        reset_peak()
        if len(finished) == windows:
            break
    return finished


def run_stream(path: str, args: argparse.Namespace) -> list[Window]:
    """The windows of a stream of `--pairs` pairs or `--minutes` minutes, whichever ends first."""
    stream = HandsOffStream(path, batch_size=args.batch_size, device=args.device, **stream_options(args))
    loader = DataLoader(stream, batch_size=None)
    started = time.perf_counter()

    def progress(pairs: int) -> float:
        by_pairs = 0.0 if args.pairs is None else pairs / args.pairs
        by_time = 0.0 if args.minutes is None else (time.perf_counter() - started) / (60 * args.minutes)
        return max(by_pairs, by_time)

    return measure_windows(loader, args.windows, progress, torch.device(args.device))


def published_peak(path: str, device: str) -> dict[str, float]:
    """Peaks of a process in which the published loop makes one pair."""
    generate = PublishedGeneration(load_checkpoint(path), device=torch.device(device))
    generate(0)
    return {"host_peak_mb": peak_mb(), "device_peak_mb": device_peak_mb(torch.device(device))}


def summary(windows: Sequence[Window]) -> dict[str, Any]:
    """Slopes over the windows after the first, and peaks, seconds and pairs over all windows."""
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


def rows(result: Result) -> list[Row]:
    """Peak against the published loop, growth, and for long runs the change of throughput."""
    length = f"{result['pairs']:,} pairs in {result['seconds'] / 60:.3g} minutes"
    growth, speed = result["host_mb_per_1000_pairs"], result["pairs_per_s_percent_per_hour"]
    on_gpu = bool(result["device_peak_mb"])
    peak = "device_peak_mb" if on_gpu else "host_peak_mb"
    ours, theirs = result[peak], result["published_pair"][peak]
    found = [
        Row(
            f"{setting(result)}: peak memory{' of the device' if on_gpu else ''}, {length}",
            f"{ours:,.0f} MB",
            f"published loop, one pair: {theirs:,.0f} MB",
            theirs / ours,
        ),
        Row(f"growth of the host's memory over {length}", _slope(growth, "MB per 1000 pairs"), "none: 0", None),
    ]
    if result["seconds"] >= MIN_SECONDS_FOR_RATE:
        found.append(Row(f"change of throughput over {length}", _slope(speed, "% per hour"), "none: 0", None))
    return found


def _slope(slope: dict[str, float], unit: str) -> str:
    return f"{slope['slope']:+.2g} ± {slope['confidence_95']:.2g} {unit}"


def charts(result: Result) -> list[Chart]:
    """Memory and throughput of each window."""
    windows = [(f"window {i}", window) for i, window in enumerate(result["windows"])]
    return [
        Chart(
            f"{setting(result)}: peak of the host's memory in each window, MB",
            [(name, window["host_peak_mb"]) for name, window in windows],
        ),
        Chart(
            "pairs per second in each window",
            [(name, window["pairs"] / window["seconds"]) for name, window in windows],
        ),
    ]


PRESENTATION = Presentation(rows, charts)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, name="memory")
    add_stream_options(options)
    geometries.add_arguments(options)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--windows", type=int, default=10)
    options.add_argument("--pairs", type=int, help="end after so many (default: 500, with --minutes no end)")
    options.add_argument("--minutes", type=float, help="end after so long")
    args = options.parse_args()
    if args.minutes is None:
        args.pairs = args.pairs or 500
    least = args.windows * args.batch_size
    if args.windows < 1 + MIN_POINTS or (args.pairs is not None and args.pairs < least):
        options.error(
            f"{args.windows} windows over {args.pairs} pairs are too few for a slope; pass at least {1 + MIN_POINTS} "
            f"windows and one batch for each, here {least} pairs"
        )
    return args


def main() -> None:
    """Measure, print a table, and write the result."""
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
