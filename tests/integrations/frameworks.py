"""The scripts of examples/integrations, run on samples of a fake synthesizer, on ranks like those of a launcher."""

import importlib
import itertools
import os
from typing import Any

import torch
from processes import run_ranks

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.stream import HandsOffStream


def synthesize(indices: Any) -> LabelledBatch:
    """Index i => an image of zeros, label i % 3, score (i * 7919) % 1000."""
    i = torch.tensor(indices, dtype=torch.int64)
    images, labels = torch.zeros(len(i), 3, 4, 4), (i % 3)[:, None, None].expand(-1, 4, 4).clone()
    return LabelledBatch(images, labels, (i * 7919 % 1000).float(), i, indices[-1] + 1)


def make_stream(checkpoint: Any, **options: Any) -> HandsOffStream[Any]:
    chosen: dict[str, Any] = {"filter": None, "chunk_size": 4, "device": "cpu", "synthesize": synthesize, **options}
    return HandsOffStream(checkpoint, **chosen)


def uninterrupted(checkpoint: Any, count: int, **options: Any) -> list[int]:
    """The first `count` indices of a stream without ranks or workers, pass after pass."""
    stream = make_stream(checkpoint, **{**options, "batch_size": 1})
    passes = itertools.chain.from_iterable(stream for _ in itertools.count())
    return [int(batch.indices) for batch in itertools.islice(passes, count)]


def run_script(name: str, runs: list[dict[str, Any]], checkpoint: str, options: dict[str, Any]) -> list[list[int]]:
    """What the script's `train` returns, called once for each run with a new stream, as the rank that this is."""
    launched_as_rank()
    script = importlib.import_module(name)
    return [script.train(make_stream(checkpoint, **options), **run) for run in runs]


def launched_as_rank() -> None:
    """Set the environment that torchrun sets."""
    if torch.distributed.is_initialized():
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ["ACCELERATE_USE_CPU"] = "true"


def run_on_ranks(name: str, count: int, **arguments: Any) -> list[list[list[int]]]:
    """By rank and run."""
    importlib.import_module(name)  # once, not on every rank
    return run_ranks(run_script, count, name=name, **arguments)


def batches_of(loader: HandsOffLoader[Any], count: int) -> list[int]:
    return [int(i) for batch, _ in zip(loader, range(count), strict=False) for i in batch.indices]
