"""Pairs per second: the stream, the published generation loop, and our own export to shards that are read back.

    python benchmarks/throughput.py --batches 20 --workers 0 2
    python benchmarks/throughput.py --checkpoint config-f-256 --batches 4 --batch-size 2 --loop-candidates 2

All sides use the same weights, seed and rejected share in one run on one device, one after the other, and deliver
batches of tensors to a loop that does nothing with them:

- stream: `DataLoader(HandsOffStream(...), batch_size=None)`, once for each number of workers;
- published: `published_generation.py`, then its files read back;
- export: `outlets.webdataset.write_shards` of our own stream, then its shards read back.

Both offline sides make all candidates before the first batch. The published loop is slow, so it makes only
`--loop-candidates` of them and its times for all batches are that measurement scaled up, if it is fewer than needed.
Offline files can be read again in a second epoch, for nothing; the stream never repeats. Times on a shared machine
mean little, their ratios more: `--rounds` takes the sides in turn several times and keeps each one's fastest.
Last line of stdout: the result as JSON.
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

import geometries
import numpy as np
import torch
import webdataset
from common import parser, result_name, settings, stream_options, synchronize, write_result
from PIL import Image
from published_generation import REJECTED_SHARE, PublishedGeneration, WrittenPairs, write_pairs
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.outlets.webdataset import write_shards


@dataclass(frozen=True)
class Delivery:
    """How one side delivered its batches."""

    first_batch_s: float
    """From the start to the first batch in hand."""
    all_batches_s: float
    pairs: int
    bytes_on_disk: int
    measured_candidates: int | None = None
    """Set if the times are scaled up from so many candidates."""

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / self.all_batches_s

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "pairs_per_s": self.pairs_per_s}


def consume(batches: Iterable[Any], count: int, device: torch.device) -> tuple[float, float]:
    """Clock readings when the first and when the last of `count` batches was on the device."""
    first = float("nan")
    delivered = 0
    for images, labels in islice(batches, count):
        images.to(device), labels.to(device)
        synchronize(device)
        delivered += 1
        if delivered == 1:
            first = time.perf_counter()
    if delivered < count:
        raise RuntimeError(f"{delivered} of {count} batches came; the side that should deliver them stopped early")
    return first, time.perf_counter()


def run_stream(path: str, args: argparse.Namespace, workers: int) -> Delivery:
    device = torch.device(args.device)
    start = time.perf_counter()
    stream = HandsOffStream(path, batch_size=args.batch_size, device=device, **stream_options(args))
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    first, last = consume(loader, args.batches, device)
    return Delivery(first - start, last - start, args.batches * args.batch_size, bytes_on_disk=0)


def run_published(path: str, args: argparse.Namespace) -> Delivery:
    """The loop makes at most `--loop-candidates`; what it would take for all of them is scaled up."""
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
    """Every side in turn, `--rounds` times; the fastest delivery of each."""
    sides: dict[str, Callable[[], Delivery]] = {
        f"stream, {workers} workers": functools.partial(run_stream, path, args, workers) for workers in args.workers
    }
    sides["published loop"] = functools.partial(run_published, path, args)
    sides["export, then read"] = functools.partial(run_export, path, args)
    device = torch.device(args.device)
    consume(HandsOffStream(path, batch_size=1, device=device, **stream_options(args)), 1, device)  # not counted,
    PublishedGeneration(load_checkpoint(path), device=device)(0)  # nor is this: first calls are slower
    best: dict[str, Delivery] = {}
    for _ in range(args.rounds):
        for name, run in sides.items():
            delivery = run()
            if name not in best or delivery.all_batches_s < best[name].all_batches_s:
                best[name] = delivery
    return best


def ratios(best: dict[str, Delivery]) -> dict[str, dict[str, float]]:
    """Per stream: how many times faster than each offline side, to the first batch and over all."""
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


def arguments() -> argparse.Namespace:
    options = parser(__doc__, name="throughput")
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
