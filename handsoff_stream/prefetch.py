"""Synthesis beside training: on a CUDA side stream, one chunk ahead of the consumer; on a CPU, in turn.

The only file that knows torch.cuda streams. It sees a callable from indices to a batch, and does not know what that
computes. Three rules keep two streams apart:
  1. the side stream starts a chunk by itself and marks its end with an event;
  2. the consumer's stream, read anew at every step, waits for that event before it sees the chunk;
  3. `record_stream` keeps the allocator from handing the chunk's memory back to the side stream before the consumer's
     pending work is done.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from handsoff_stream.batch import LabelledBatch

CHUNKS_IN_FLIGHT = 2  # the next chunk is enqueued before the host waits for this one's scores


def prefetch(
    synthesize: Callable[[Sequence[int]], LabelledBatch],
    chunks: Iterable[Sequence[int]],
    device: torch.device,
) -> Iterator[LabelledBatch]:
    """Batches of the chunks, in order; on CUDA safe to use on the consumer's current stream.

    Args:
        synthesize: indices => batch on `device`.
        chunks: indices of each batch; may be endless.
        device: where `synthesize` works.
    """
    if device.type != "cuda":
        return (synthesize(chunk) for chunk in chunks)
    return _prefetch_cuda(synthesize, chunks, device)


def _prefetch_cuda(
    synthesize: Callable[[Sequence[int]], LabelledBatch],
    chunks: Iterable[Sequence[int]],
    device: torch.device,
) -> Iterator[LabelledBatch]:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way
    in_flight: deque[tuple[LabelledBatch, torch.cuda.Event]] = deque()
    source = iter(chunks)
    while True:
        for chunk in source:
            with torch.cuda.stream(side):
                batch = synthesize(chunk)
                in_flight.append((batch, side.record_event()))
            if len(in_flight) == CHUNKS_IN_FLIGHT:
                break
        if not in_flight:
            return
        batch, done = in_flight.popleft()
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(done)
        batch.record_stream(consumer)
        yield batch
