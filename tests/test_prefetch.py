"""Work runs ahead on a side stream, and the consumer never sees it before it is done: checked without a GPU.

`FakeCuda` replaces torch.cuda's streams and events by a recorder of the same calls in the same order; the tests then
hold the order to the three rules of `prefetch.py`. The same code on a real device is tested at the end (marker gpu).
"""

import itertools

import pytest
import torch

from handsoff_stream import prefetch as module
from handsoff_stream.device import default_chunk_size
from handsoff_stream.prefetch import CHUNKS_IN_FLIGHT, prefetch

CUDA = torch.device("cuda")


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "wait_stream", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "wait_event", event))

    def record_event(self):
        event = f"event{sum(entry[1] == 'record_event' for entry in self.log)}"
        self.log.append((self.name, "record_event", event))
        return event

    def __enter__(self):
        self.log.append((self.name, "enter"))

    def __exit__(self, *_):
        self.log.append((self.name, "exit"))


class FakeBatch:
    def __init__(self, log, chunk):
        self.log, self.chunk = log, chunk

    def record_stream(self, stream):
        self.log.append((stream.name, "record_stream", self.chunk))


@pytest.fixture
def cuda(monkeypatch):
    """The recorded calls, and a box whose value is the consumer's current stream."""
    log = []
    current = [FakeStream(log, "consumer")]
    monkeypatch.setattr(module.torch.cuda, "Stream", lambda device: FakeStream(log, "side"))
    monkeypatch.setattr(module.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(module.torch.cuda, "current_stream", lambda device: current[0])
    return log, current


def synthesizer(log):
    def synthesize(chunk):
        log.append(("side", "synthesize", chunk))
        return FakeBatch(log, chunk)

    return synthesize


def position(log, *entry) -> int:
    return log.index(entry)


def test_every_chunk_is_handed_out_once_in_order(cuda):
    log, _ = cuda
    assert [b.chunk for b in prefetch(synthesizer(log), range(7), CUDA)] == list(range(7))
    assert list(prefetch(synthesizer(log), [], CUDA)) == []


def test_a_chunk_is_synthesised_on_the_side_stream_and_marked_by_an_event(cuda):
    log, _ = cuda
    list(prefetch(synthesizer(log), range(3), CUDA))
    for chunk in range(3):
        at = position(log, "side", "synthesize", chunk)
        assert log[at - 1] == ("side", "enter")
        assert log[at + 1] == ("side", "record_event", f"event{chunk}")
        assert log[at + 2] == ("side", "exit")


def test_the_side_stream_waits_for_the_weights(cuda):
    log, _ = cuda
    next(prefetch(synthesizer(log), range(3), CUDA))
    assert log[0] == ("side", "wait_stream", "consumer")


def test_the_consumer_waits_for_the_event_and_claims_the_memory_before_it_sees_a_chunk(cuda):
    log, _ = cuda
    for batch in prefetch(synthesizer(log), range(5), CUDA):
        waited = position(log, "consumer", "wait_event", f"event{batch.chunk}")
        claimed = position(log, "consumer", "record_stream", batch.chunk)
        assert waited < claimed


def test_the_current_stream_is_read_anew_at_every_step(cuda):
    log, current = cuda
    batches = prefetch(synthesizer(log), range(4), CUDA)
    for step in range(4):
        current[0] = FakeStream(log, f"consumer{step}")
        next(batches)
        assert (f"consumer{step}", "wait_event", f"event{step}") in log
        assert (f"consumer{step}", "record_stream", step) in log


def test_the_next_chunk_is_under_way_before_the_first_is_handed_out_and_no_more(cuda):
    log, _ = cuda
    batches = prefetch(synthesizer(log), itertools.count(), CUDA)
    for handed_out in range(1, 6):
        next(batches)
        begun = sum(entry[1] == "synthesize" for entry in log)
        assert begun == handed_out + CHUNKS_IN_FLIGHT - 1


def test_an_error_in_the_synthesis_reaches_the_consumer(cuda):
    def fail(chunk):
        raise ValueError(f"chunk {chunk} failed")

    with pytest.raises(ValueError, match="chunk 0 failed"):
        next(prefetch(fail, range(3), CUDA))


def test_on_a_cpu_nothing_runs_ahead():
    begun = []
    batches = prefetch(lambda chunk: begun.append(chunk) or chunk, itertools.count(), torch.device("cpu"))
    assert [next(batches) for _ in range(3)] == begun == [0, 1, 2]


def test_chunks_are_larger_on_cuda():
    assert default_chunk_size(torch.device("cpu")) == 4
    assert default_chunk_size(CUDA) == 16


@pytest.mark.gpu
def test_on_a_gpu_a_consumer_on_any_stream_sees_finished_chunks():
    """Fails without the wait: each chunk is written by a long chain of kernels, and read at once by another stream."""
    from handsoff_stream.batch import LabelledBatch

    def synthesize(chunk):
        images = torch.zeros(2, 3, 512, 512, device="cuda")
        for _ in range(200):
            images += 1
        scores = torch.full((2,), float(chunk), device="cuda")
        return LabelledBatch(images, images[:, 0].long(), scores, torch.tensor([chunk, chunk]), chunk + 1)

    streams = [torch.cuda.Stream() for _ in range(3)]
    batches = prefetch(synthesize, range(30), CUDA)
    for step in range(30):
        with torch.cuda.stream(streams[step % 3]):
            batch = next(batches)
            total = batch.images.sum()
        assert total.item() == 200 * batch.images.numel()
