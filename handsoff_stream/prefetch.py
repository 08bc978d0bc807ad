"""Synthesis beside training: on CUDA several chunks ahead of the consumer, on a side stream; on a CPU in turn.

The only file that knows torch.cuda streams. It sees a callable from indices to a batch and hands out `Chunk`s: scores
on the host, samples to copy from. It does not know what is computed, nor which samples are wanted.

There is one side stream per device and process: networks are prepared on it (`side_stream`), so every later chunk
finds them ready whoever asks, and memory that the allocator keeps for it is kept once.

Finished chunks lie in a ring of slots, allocated once and written again and again. Five rules keep the streams apart;
the tests take each away in turn and see wrong data:
  1. the side stream waits once for the consumer's stream: weights that were given may still be on their way;
  2. the host reads a chunk's scores after the chunk's event. Later chunks are enqueued by then, so while it waits, the
     device works on;
  3. a reader's stream, whichever is current at that moment, waits for the chunk's event;
  4. a reader's stream marks the end of its reading by an event, and the side stream waits for it before it writes the
     slot again;
  5. `record_stream` keeps the allocator from reusing the ring itself while a reader is still at work, should the
     stream end or be dropped.
There is no thread and no process, so there is nothing to shut down: a ring that nothing refers to is freed.
"""

import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.isolation import isolated

CHUNKS_IN_FLIGHT = 3  # while the host waits for the first, the device has two more to do
PRIORITY = -1  # above the consumer's: the ring bounds how far synthesis runs ahead, and a late batch stops training

Synthesize = Callable[[Sequence[int]], LabelledBatch]


class Chunk(Protocol):
    """The samples of some indices, perhaps still under way. Its memory is used again once nothing refers to it."""

    @property
    def indices(self) -> Sequence[int]:
        """The index of each sample."""
        ...

    def finished(self) -> bool:
        """Whether `scores` would not wait."""

    def scores(self) -> list[float]:
        """Uncertainty of each sample; the host waits until the chunk is finished."""

    def reading(self) -> AbstractContextManager[LabelledBatch]:
        """The samples, for work enqueued inside the `with` block on the current stream; what is to stay is copied."""


def prefetch(
    synthesize: Synthesize,
    chunks: Iterable[Sequence[int]],
    device: torch.device,
    output_device: torch.device | None = None,
) -> Iterator[Chunk]:
    """The chunks in order, safe to read on any stream.

    An exception in `synthesize` reaches the consumer after the chunks before it, with a note that names the indices.

    Args:
        synthesize: indices => batch on `device`, of the same shapes for every chunk.
        chunks: indices of each batch; may be endless.
        device: where `synthesize` works.
        output_device: where chunks lie; None means `device`. From CUDA to a CPU they lie in pinned memory.
    """
    if device.type != "cuda":
        return _in_turn(synthesize, chunks, output_device or device)
    return _SideStream(synthesize, device, output_device or device).run(chunks)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """For the preparation of networks: work enqueued inside comes before all chunks, on CUDA; no global setting counts.

    Networks are prepared here and not on the stream of whoever asks first, because the next one who asks may be on
    another stream, which knows nothing of the first.
    """
    with isolated():
        if device.type != "cuda":
            yield
            return
        side = _stream("side", device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield


def _stream(role: str, device: torch.device) -> torch.cuda.Stream:
    """The one of its role on this device in this process."""
    key = (role, _numbered(device), os.getpid())
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device, priority=PRIORITY)
    return _streams[key]


_streams: dict[tuple[str, torch.device, int], torch.cuda.Stream] = {}


def _in_turn(synthesize: Synthesize, chunks: Iterable[Sequence[int]], output: torch.device) -> Iterator[Chunk]:
    for indices in chunks:
        with _located(indices):
            with isolated():
                batch = synthesize(indices)
            chunk = _FinishedChunk(indices, batch.uncertainty.tolist(), batch.to(output))
        yield chunk


@dataclass(frozen=True)
class _FinishedChunk:
    indices: Sequence[int]
    host_scores: list[float]
    batch: LabelledBatch

    def finished(self) -> bool:
        return True

    def scores(self) -> list[float]:
        return self.host_scores

    def reading(self) -> AbstractContextManager[LabelledBatch]:
        return nullcontext(self.batch)


class _SideStream:
    """Enqueues chunks ahead of their consumer and owns the ring."""

    def __init__(self, synthesize: Synthesize, device: torch.device, output: torch.device):
        self._synthesize = synthesize
        self._output = _numbered(output)
        self._side = _stream("side", device)
        # A copy between two GPUs makes the current streams of both wait for each other: never the consumer's.
        apart = output.type == "cuda" and self._output != _numbered(device)
        self._landing = _stream("landing", output) if apart else self._side
        self._free: deque[_Slot] = deque()
        self._side.wait_stream(torch.cuda.current_stream(device))

    def run(self, chunks: Iterable[Sequence[int]]) -> Iterator[Chunk]:
        source = iter(chunks)
        in_flight: deque[Chunk | Exception] = deque()
        while True:
            for indices in source:
                try:
                    in_flight.append(self._enqueue(indices))
                except Exception as error:
                    _let_go(error)
                    in_flight.append(error)
                    source = iter(())
                    break
                if len(in_flight) == CHUNKS_IN_FLIGHT:
                    break
            if not in_flight:
                return
            yield _or_raise(in_flight.popleft())

    def _enqueue(self, indices: Sequence[int]) -> Chunk:
        with _located(indices), torch.cuda.stream(self._landing), torch.cuda.stream(self._side):
            with isolated():
                batch = self._synthesize(indices)
            slot = self._free.popleft() if self._free else _Slot(batch, self._output)
            slot.fill(batch, self._side)
            return _ChunkInSlot(indices, slot, self._side.record_event(), self._free)


class _Slot:
    """Memory for one chunk, and an event for each stream that may still be reading it."""

    def __init__(self, like: LabelledBatch, output: torch.device):
        self.output = output
        self.batch = like.map(lambda tensor: _empty_like(tensor, output))
        self.scores = _empty_like(like.uncertainty, torch.device("cpu"))
        self._readers: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def fill(self, batch: LabelledBatch, side: torch.cuda.Stream) -> None:
        """Enqueue the copy of `batch` into the slot, after all reading of what it held."""
        for event in self._readers.values():
            side.wait_event(event)
        self._readers.clear()
        for target, source in zip(self.batch.tensors(), batch.tensors(), strict=True):
            target.copy_(source, non_blocking=True)
        self.scores.copy_(batch.uncertainty, non_blocking=True)
        self.batch = replace(self.batch, indices=batch.indices, next_index=batch.next_index)

    @contextmanager
    def reading(self, filled: torch.cuda.Event) -> Iterator[LabelledBatch]:
        stream = torch.cuda.current_stream(self.output)
        stream.wait_event(filled)
        self.batch.record_stream(stream)
        try:
            yield self.batch
        finally:
            self._readers[stream] = stream.record_event()


class _ChunkInSlot:
    """A chunk on its way into a slot, which goes back to the ring with the last reference to the chunk."""

    def __init__(self, indices: Sequence[int], slot: _Slot, filled: torch.cuda.Event, free: deque[_Slot]):
        self.indices = indices
        self._slot = slot
        self._filled = filled
        self._free = free

    def finished(self) -> bool:
        return self._filled.query()

    def scores(self) -> list[float]:
        self._wait()
        return self._slot.scores.tolist()

    def reading(self) -> AbstractContextManager[LabelledBatch]:
        if self._slot.output.type == "cuda":
            return self._slot.reading(self._filled)
        self._wait()
        return nullcontext(self._slot.batch)

    def _wait(self) -> None:
        with _located(self.indices):
            self._filled.synchronize()

    def __del__(self) -> None:
        self._free.append(self._slot)


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that an exception remembers: it may wait for its turn while chunks before it are consumed, and
    after a failed allocation their tensors are what memory is short of."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@torch.inference_mode(False)  # or else it could not be written again outside of the consumer's inference mode
def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Uninitialized memory; page-locked on a CPU, so that copies to it are asynchronous."""
    return torch.empty_like(tensor, device=device, pin_memory=device.type == "cpu")


def _numbered(device: torch.device) -> torch.device:
    """The device itself; "cuda" becomes the current one by number, so that later changes of it mean nothing."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _or_raise(item: Chunk | Exception) -> Chunk:
    if isinstance(item, Exception):
        raise item
    return item


@contextmanager
def _located(indices: Sequence[int]) -> Iterator[None]:
    """Note on an exception which indices were under way."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while the samples {indices[0]} to {indices[-1]} were being synthesized")
        raise
