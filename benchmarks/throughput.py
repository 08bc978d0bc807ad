"""Time to the first training batch, and to N of them: the stream against generating to disk first.

    python benchmarks/throughput.py --batches 100

Both sides use the same checkpoint, seed, batch size and filter share in one run, one after the other, on one device:

- stream: `DataLoader(HandsOffStream(...), batch_size=None)`;
- offline: synthesise the candidates, write each as two PNG files and a score, sort, drop the worst tenth, then read
  what is left through a DataLoader, as the published code does (its sum of float32 uncertainty maps is left out, which
  favours the offline side).

Neither side trains: what is measured is how fast pairs arrive. The offline side could read its files again in a second
epoch, for nothing; the stream never repeats. The table says so. Last line of stdout: the result as JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from handsoff_stream import HandsOffStream


class PairFolder(Dataset[tuple[Tensor, Tensor]]):
    """The kept pairs of an offline run."""

    def __init__(self, folder: Path):
        scores: dict[str, float] = json.loads((folder / "scores.json").read_text())
        ranked = sorted(scores, key=scores.__getitem__)
        self.stems = sorted(ranked[: round(len(ranked) * 0.9)])
        self.folder = folder

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        stem = self.folder / self.stems[index]
        image = torch.from_numpy(np.array(Image.open(f"{stem}.image.png"))).permute(2, 0, 1).float() / 255
        return image, torch.from_numpy(np.array(Image.open(f"{stem}.mask.png"))).long()


def generate_offline(batches: Iterable[Any], folder: Path, count: int) -> None:
    """At least `count` unfiltered pairs and their scores as files."""
    scores: dict[str, float] = {}
    for batch in batches:
        rows = zip(batch.images.cpu(), batch.labels.cpu(), batch.uncertainty.tolist(), batch.indices, strict=True)
        for image, label, score, index in rows:
            stem = f"{int(index):012d}"
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{stem}.image.png")
            Image.fromarray(label.to(torch.uint8).numpy()).save(folder / f"{stem}.mask.png")
            scores[stem] = score
        if len(scores) >= count:
            break
    (folder / "scores.json").write_text(json.dumps(scores))


def time_batches(loader: DataLoader[Any], batches: int, started: float) -> dict[str, float]:
    """Seconds from `started` to the first and to the last of so many batches."""
    first = float("nan")
    for number, _ in zip(range(1, batches + 1), loader, strict=False):
        if number == 1:
            first = time.perf_counter() - started
    return {"first_batch_s": first, "all_batches_s": time.perf_counter() - started}


def run_stream(args: argparse.Namespace) -> dict[str, float]:
    started = time.perf_counter()
    stream = HandsOffStream(args.checkpoint, batch_size=args.batch_size, device=args.device)
    times = time_batches(DataLoader(stream, batch_size=None), args.batches, started)
    return {**times, "bytes_on_disk": 0, "rejected": stream.rejected, "pairs": args.batches * args.batch_size}


def run_offline(args: argparse.Namespace) -> dict[str, float]:
    candidates = -(-args.batches * args.batch_size * 10 // 9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        stream = HandsOffStream(args.checkpoint, batch_size=args.batch_size, filter=None, device=args.device)
        generate_offline(stream, folder, candidates)
        generated = time.perf_counter() - started
        loader = DataLoader(PairFolder(folder), batch_size=args.batch_size, num_workers=args.workers)
        times = time_batches(loader, args.batches, started)
        size = sum(f.stat().st_size for f in folder.iterdir())
    reading = times["all_batches_s"] - generated
    pairs = args.batches * args.batch_size
    return {**times, "bytes_on_disk": size, "reading_s": reading, "candidates": candidates, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="faces")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers that read the offline files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    next(iter(HandsOffStream(args.checkpoint, batch_size=args.batch_size, device=args.device)))  # warm-up, not counted
    stream, offline = run_stream(args), run_offline(args)
    ratios = {
        "first_batch_ratio": offline["first_batch_s"] / stream["first_batch_s"],
        "all_batches_ratio": offline["all_batches_s"] / stream["all_batches_s"],
    }
    for side in (stream, offline):
        side["pairs_per_s"] = side["pairs"] / side["all_batches_s"]
    rows = ["first_batch_s", "all_batches_s", "pairs_per_s", "bytes_on_disk"]
    table = Table("", "stream", "offline, then read", title=f"{args.batches} batches of {args.batch_size}")
    for row in rows:
        table.add_row(row, f"{stream[row]:,.2f}", f"{offline[row]:,.2f}")
    Console().print(table)
    write_result("throughput", {"arguments": vars(args), "stream": stream, "offline": offline, **ratios})


if __name__ == "__main__":
    main()
