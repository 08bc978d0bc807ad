"""Streams in separate processes: ranks that find each other over tcp://, and DataLoader workers of any start method.

A fake synthesizer makes the stream's samples, so that a process only costs its start.
"""

import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.filters import BlockQuantile, Filter, RollingPercentile, Threshold
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.stream import HandsOffStream

FILTERS: dict[str, Callable[[], Filter | None]] = {
    "none": lambda: None,
    "threshold": lambda: Threshold(value=700),
    "block": lambda: BlockQuantile(80, block=10),
    "rolling": lambda: RollingPercentile(80, window=15, lanes=12),
}


def score_of(index: int) -> float:
    return float(index * 7919 % 1000)


def synthesize(indices: Any) -> LabelledBatch:
    """Index i => an image of zeros, label i, score (i * 7919) % 1000."""
    i = torch.tensor(indices, dtype=torch.int64)
    return LabelledBatch(torch.zeros(len(i), 3, 1, 1), i[:, None, None], (i * 7919 % 1000).float(), i, indices[-1] + 1)


def fake_stream(checkpoint: Checkpoint | str | Path, filter: str = "none", **options: Any) -> HandsOffStream[Any]:
    chosen: dict[str, Any] = {"chunk_size": 4, "device": "cpu", "synthesize": synthesize, **options}
    return HandsOffStream(checkpoint, filter=FILTERS[filter](), **chosen)


def indices_of(batches: Any) -> list[int]:
    return [int(index) for batch in batches for index in batch.indices]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(job: Callable[..., Any], count: int, *, killed: bool = False, **arguments: Any) -> list[Any]:
    """What a function returns on each of `count` ranks, which know each other and no launcher.

    `killed`: they end by SIGKILL, and return nothing.
    """
    forked = multiprocessing.get_context("fork")  # torch is loaded once
    port, queue = free_port(), forked.SimpleQueue()
    ranks = [
        forked.Process(target=_on_rank, args=(job, rank, count, port, None if killed else queue, arguments))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    results = {} if killed else dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if killed else 0)
    for rank, (result, error) in results.items():
        assert error is None, f"rank {rank}: {error}"
        results[rank] = result
    return [results[rank] for rank in sorted(results)]


def _on_rank(job: Callable[..., Any], rank: int, count: int, port: int, queue: Any, arguments: dict[str, Any]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    # A forkserver that an earlier test started belongs to the parent; this process needs one of its own.
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[misc]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    try:
        outcome = job(**arguments), None
    except Exception:
        outcome = None, traceback.format_exc()
    if queue is not None:
        queue.put((rank, outcome))


# Jobs ------------------------------------------------------------------------------------------------------------


def first_batches(checkpoint: str, workers: int, context: str | None, batches: int) -> list[int]:
    stream = fake_stream(checkpoint, batch_size=4)
    loader = DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context)
    return indices_of(batch for batch, _ in zip(loader, range(batches), strict=False))


def whole_epoch(checkpoint: str, workers: int, epoch_size: int) -> dict[str, Any]:
    """With a collective operation after every batch, as DDP has one: it hangs if a rank has more than another."""
    stream = fake_stream(checkpoint, batch_size=8, epoch_size=epoch_size, filter="threshold")
    sizes, seen = [], []
    for batch in DataLoader(stream, batch_size=None, num_workers=workers):
        torch.distributed.all_reduce(torch.ones(1))
        sizes.append(len(batch))
        seen += indices_of([batch])
    return {"len": len(stream), "sizes": sizes, "seen": seen}


def part_of_run(
    checkpoint: str, state: str | None, folder: str, batch_size: int, workers: int, batches: int, kill_at: int | None
) -> None:
    """Some batches of every filter's stream; after each batch its indices and the state, in a line of a file.

    With `kill_at` the process ends by SIGKILL after so many lines, wherever its workers are.
    """
    rank, lines = torch.distributed.get_rank(), 0
    for name in FILTERS:
        stream = fake_stream(checkpoint, name, batch_size=batch_size)
        loader = HandsOffLoader(stream, num_workers=workers)
        if state is not None:
            loader.load_state_dict(json.loads(Path(state).read_text())[name])
        with open(Path(folder) / f"{name}.{rank}", "a") as log:
            for batch in itertools.islice(loader, batches):
                log.write(json.dumps([indices_of([batch]), loader.state_dict()]) + "\n")
                log.flush()
                lines += 1
                if lines == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
