"""Pairs per second: the stream, the published generation loop, and an export to shards that are read back.

    python -m benchmarks.throughput --batches 20 --workers 0 2
    python -m benchmarks.throughput --checkpoint config-f-256 --batches 4 --batch-size 2 --loop-candidates 2

A pair is an image with its label. All sides use the same weights, seed and rejected share; they run one after the
other on one device and deliver batches of tensors to a loop that does nothing with them:

- stream: `DataLoader(HandsOffStream(...), batch_size=None)`, once for each number of workers;
- published loop: `reference.published_generation`, then its files are read back;
- export: `outlets.webdataset.write_shards` on the stream, then its shards are read back.

Both offline sides make all candidates before they deliver the first batch. The published loop is slow: it makes at most
`--loop-candidates`, and if more are needed, its times are scaled up. A second epoch could read the offline files again
at no cost; the stream never repeats a pair. On a shared machine the ratios mean more than the times: with `--rounds`,
the sides take turns several times and the fastest delivery of each counts. The last line of the output is the result
as JSON.
"""

import argparse
import functools
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
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
from benchmarks.reference.published_generation import REJECTED_SHARE, PublishedGeneration, WrittenPairs, write_pairs
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row, setting
from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.outlets.webdataset import write_shards

HEADLINE_CHECKPOINTS = ("faces", "config-f-1024")
"""README.md shows the throughput of the embedded generator and of the largest one."""


@dataclass(frozen=True)
class Delivery:
    """How one side delivered its batches."""

    first_batch_s: float
    """Seconds from the start until the first batch was on the device."""
    all_batches_s: float
    """Seconds from the start until the last batch was on the device."""
    pairs: int
    bytes_on_disk: int
    measured_candidates: int | None = None
    """The number of candidates that were made, if the times are scaled up from them; else None."""

    @property
    def pairs_per_s(self) -> float:
        """Pairs per second."""
        return self.pairs / self.all_batches_s

    def record(self) -> dict[str, Any]:
        """The delivery, JSON-able."""
        return {**asdict(self), "pairs_per_s": self.pairs_per_s}


def consume(batches: Iterable[Any], count: int, device: torch.device) -> tuple[float, float]:
    """Clock readings in seconds when the first and when the last of `count` batches was on the device.

    Raises:
        RuntimeError: fewer than `count` batches came.
    """
    first = float("nan")
    delivered = 0
    for images, labels in islice(batches, count):
        images.to(device), labels.to(device)
        synchronize(device)
        delivered += 1
        if delivered == 1:
            first = time.perf_counter()
    if delivered < count:
        raise RuntimeError(f"{delivered} of {count} batches came, so their time is unknown; ask this side for less")
    return first, time.perf_counter()


def run_stream(path: str, args: argparse.Namespace, workers: int) -> Delivery:
    """Batches of the stream of the checkpoint `path`, through a loader with `workers` worker processes."""
    device = torch.device(args.device)
    start = time.perf_counter()
    stream = HandsOffStream(path, batch_size=args.batch_size, device=device, **stream_options(args))
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    first, last = consume(loader, args.batches, device)
    return Delivery(first - start, last - start, args.batches * args.batch_size, bytes_on_disk=0)


def run_published(path: str, args: argparse.Namespace) -> Delivery:
    """Batches of the published loop's files; the loop's time is scaled up if it makes fewer pairs than are needed."""
    device = torch.device(args.device)
    pairs = args.batches * args.batch_size
    needed = math.ceil(pairs / (1 - REJECTED_SHARE))
    candidates = min(needed, args.loop_candidates)
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        generate = PublishedGeneration(load_checkpoint(path), device=device, host_buffer=args.host_buffer)
        ready = time.perf_counter()
        write_pairs(generate, folder, count=candidates)
        generated = time.perf_counter()
        kept = WrittenPairs(folder)
        size = min(args.batch_size, len(kept))
        first, last = consume(DataLoader(kept, batch_size=size), len(kept) // size, device)
        bytes_on_disk = _bytes(folder)
    before_reading = ready - start + (generated - ready) * needed / candidates
    return Delivery(
        first_batch_s=before_reading + first - generated,
        all_batches_s=before_reading + (last - generated) * pairs / (len(kept) // size * size),
        pairs=pairs,
        bytes_on_disk=bytes_on_disk * needed // candidates,
        measured_candidates=candidates if candidates < needed else None,
    )


def run_export(path: str, args: argparse.Namespace) -> Delivery:
    """Batches of shards that the stream was exported to."""
    device = torch.device(args.device)
    pairs = args.batches * args.batch_size
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        stream = HandsOffStream(path, batch_size=args.batch_size, device=device, **stream_options(args))
        shards = write_shards(stream, name, num_samples=pairs)
        first, last = consume(DataLoader(exported(shards), batch_size=args.batch_size), args.batches, device)
        return Delivery(first - start, last - start, pairs, _bytes(Path(name)))


def exported(shards: list[Path]) -> Any:
    """The samples of a WebDataset export: image float32 [3, H, W] in [0, 1], label int64 [H, W]."""
    dataset: Any = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)
    return dataset.map(_decode)


def _decode(files: dict[str, bytes]) -> tuple[Tensor, Tensor]:
    image, label = (
        torch.from_numpy(np.array(Image.open(io.BytesIO(files[name])))) for name in ("image.png", "label.png")
    )
    return image.permute(2, 0, 1).float() / 255, label.long()


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def compare(path: str, args: argparse.Namespace) -> dict[str, Delivery]:
    """The fastest delivery of each side; the sides take turns, `--rounds` times."""
    sides: dict[str, Callable[[], Delivery]] = {
        f"stream, {workers} workers": functools.partial(run_stream, path, args, workers) for workers in args.workers
    }
    sides["published loop"] = functools.partial(run_published, path, args)
    sides["export, then read"] = functools.partial(run_export, path, args)
    device = torch.device(args.device)
    # First calls are slower: one of each side is not counted.
    consume(HandsOffStream(path, batch_size=1, device=device, **stream_options(args)), 1, device)
    PublishedGeneration(load_checkpoint(path), device=device)(0)
    best: dict[str, Delivery] = {}
    for _ in range(args.rounds):
        for name, run in sides.items():
            delivery = run()
            if name not in best or delivery.all_batches_s < best[name].all_batches_s:
                best[name] = delivery
    return best


def ratios(best: dict[str, Delivery]) -> dict[str, dict[str, float]]:
    """How many times faster each stream is than each offline side, to the first batch and to the last."""
    streams = {name: delivery for name, delivery in best.items() if name.startswith("stream")}
    offline = {name: delivery for name, delivery in best.items() if name not in streams}
    return {
        f"{name} against {other}": {
            "first_batch": theirs.first_batch_s / ours.first_batch_s,
            "all_batches": theirs.all_batches_s / ours.all_batches_s,
        }
        for name, ours in streams.items()
        for other, theirs in offline.items()
    }


def rows(result: Result) -> list[Row]:
    """The streams against the published loop; the fastest stream against the export."""
    sides, ratio, place = result["sides"], result["ratios"], setting(result)
    streams = [name for name in sides if name.startswith("stream")]
    loop, export = "published loop", "export, then read"
    scaled = sides[loop]["measured_candidates"]
    slow = f"{loop}: {_rate(sides[loop])}" + (f", from {scaled} pairs" if scaled is not None else "")
    best = max(streams, key=lambda name: sides[name]["pairs_per_s"])
    megabytes = sides[export]["bytes_on_disk"] / 1e6
    rest = f"{export}: {sides[export]['first_batch_s']:.3g} s, {megabytes:.3g} MB on disk"
    pair, first = ratio[f"{best} against {export}"], f"{sides[best]['first_batch_s']:.3g} s, nothing on disk"
    checkpoint = result["settings"]["checkpoint"]
    headline = checkpoint in HEADLINE_CHECKPOINTS
    return [
        *(
            Row(
                f"{place}: {name}",
                _rate(sides[name]),
                slow,
                ratio[f"{name} against {loop}"]["all_batches"],
                name == best and headline,
            )
            for name in streams
        ),
        Row(f"{place}: {best}", _rate(sides[best]), f"{export}: {_rate(sides[export])}", pair["all_batches"]),
        Row(f"{place}: first batch after", first, rest, pair["first_batch"], checkpoint == "faces"),
    ]


def _rate(side: Result) -> str:
    return f"{side['pairs_per_s']:.3g} pairs/s"


def charts(result: Result) -> list[Chart]:
    """Pairs per second of each side."""
    bars = [(name, side["pairs_per_s"]) for name, side in result["sides"].items()]
    return [Chart(f"{setting(result)}: pairs per second", bars)]


PRESENTATION = Presentation(rows, charts)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, name="throughput")
    add_stream_options(options)
    geometries.add_arguments(options)
    options.add_argument("--batches", type=int, default=20)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--workers", type=int, nargs="+", default=[0], help="stream once with each; CUDA: 0")
    options.add_argument("--loop-candidates", type=int, default=20, help="pairs the published loop makes at most")
    options.add_argument("--host-buffer", action="store_true", help="the loop allocates hypercolumns on the host")
    options.add_argument("--rounds", type=int, default=1)
    args = options.parse_args()
    for name in ("batches", "batch_size", "loop_candidates", "rounds"):
        if getattr(args, name) < 1:
            options.error(f"{name}={getattr(args, name)} measures nothing; pass at least 1")
    return args


def main() -> None:
    """Measure, print a table, and write the result."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = geometries.checkpoint_path(args, Path(folder))
        best = compare(path, args)
        geometry = geometries.describe(load_checkpoint(path))
    title = f"{args.checkpoint}, labels {geometry['label']}: {args.batches} batches of {args.batch_size}, {args.device}"
    table = Table("", "first batch, s", "all batches, s", "pairs/s", "on disk, MB", title=title)
    for name, delivery in best.items():
        scaled = "" if delivery.measured_candidates is None else f" (scaled from {delivery.measured_candidates})"
        times = (delivery.first_batch_s, delivery.all_batches_s, delivery.pairs_per_s, delivery.bytes_on_disk / 1e6)
        table.add_row(name + scaled, *(f"{number:,.2f}" for number in times))
    Console().print(table)
    record = {
        "settings": settings(args),
        "geometry": geometry,
        "sides": {name: delivery.record() for name, delivery in best.items()},
        "ratios": ratios(best),
    }
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
