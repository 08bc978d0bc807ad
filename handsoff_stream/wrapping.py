"""Whether what iterates or pickles a stream would lose its samples or fail on them, as the call stack shows.

Accelerate's `prepare`, and with it Hugging Face's Trainer, puts an iterable dataset into a shard that hands each rank
its part of what the dataset yields, or lets rank 0 alone iterate. A stream that yields its rank's part by itself would
lose the rest without a word. Forked workers have the stack of the process that started them.

A DataLoader with `pin_memory=True` asks each tensor for page-locked memory, also one that lies on CUDA, and fails there
with a message that names no remedy. Batches answer it, see `LabelledBatch.pin_memory`; samples are plain tensors, which
cannot.

Lightning resumes a training at a step of its own, but tells a plain DataLoader nothing, so that the stream would begin
again with the samples of its first epoch.

Knows names of modules and classes. Does not know streams.
"""

import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate, default_convert

from handsoff_stream.errors import StreamError

FIT_LOOPS = {"lightning.pytorch.loops.fit_loop", "pytorch_lightning.loops.fit_loop"}
DIVIDERS = {
    ("accelerate.data_loader", "DataLoaderDispatcher"),
    ("accelerate.data_loader", "IterableDatasetShard"),
    ("transformers.trainer_pt_utils", "IterableDatasetShard"),
}


def check_not_divided_again(ranks: int) -> None:
    """Refuse to be iterated or pickled by what divides samples among `ranks` ranks a second time.

    Raises:
        StreamError: with the loader to use instead.
    """
    for frame in _callers() if ranks > 1 else ():
        found = frame.f_globals.get("__name__"), type(frame.f_locals.get("self")).__name__
        if found in DIVIDERS:
            raise StreamError(
                f"Accelerate's {found[1]} divides the samples among {ranks} ranks, and this stream has already done "
                "so, so most of them would be lost; iterate HandsOffLoader(stream), which needs no "
                "`accelerator.prepare` (with the Trainer: StreamTrainer), or pass shard=Shard(0, 1) to let Accelerate "
                "divide the samples"
            )


def check_not_pinned(samples: object, device: torch.device) -> None:
    """Refuse to be iterated by a DataLoader that would pin samples which lie on a device.

    Args:
        samples: the dataset of the DataLoader, if this is about it.
        device: where its samples lie.

    Raises:
        StreamError: with the remedy.
    """
    for frame in _callers() if device.type != "cpu" else ():
        loader: Any = frame.f_locals.get("self")
        if not isinstance(loader, DataLoader) or loader.dataset is not samples or not loader.pin_memory:
            continue
        if loader.collate_fn in (default_collate, default_convert):
            raise StreamError(
                f"pin_memory=True is for samples on a CPU, and these lie on {device} already, so the DataLoader would "
                "fail; pass pin_memory=False, or build the stream with batch_size=..., whose batches are left alone"
            )


def warn_if_training_goes_on() -> None:
    """Warn that a stream which begins with its first sample is iterated by a training that does not.

    Issues:
        UserWarning: with the loader and the callback that resume.
    """
    for frame in _callers():
        if frame.f_globals.get("__name__") not in FIT_LOOPS:
            continue
        step = getattr(getattr(frame.f_locals.get("self"), "trainer", None), "global_step", 0)
        if step > 0:
            warnings.warn(
                f"Lightning goes on at step {step}, but this stream begins with its first sample, because nothing told "
                "it where it was: samples would be trained on again. Pass HandsOffLoader(stream) with the callback "
                "StreamPosition(loader) to resume exactly, or call stream.set_epoch(...) with an epoch that was not "
                "begun; nothing is wrong if the stream is new to this training",
                stacklevel=2,
            )
        return


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
