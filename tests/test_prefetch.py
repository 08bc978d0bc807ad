"""Work runs ahead on a side stream, and no one sees it before it is done: proved without a GPU.

`LateCuda` runs the real code on streams that work late and out of order; each rule of `prefetch.py` is left out in
turn to show that the data then is wrong. The same code on a real device is tested at the end (marker gpu).
"""

import itertools
import subprocess
import sys
import weakref

import pytest
import torch
from late_cuda import POLICIES, LateCuda, Stream

from handsoff_stream import prefetch as module
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.device import default_chunk_size
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.prefetch import CHUNKS_IN_FLIGHT, prefetch
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer

CPU, CUDA, CUDA_0, CUDA_1 = map(torch.device, ("cpu", "cuda", "cuda:0", "cuda:1"))
CHUNKS = [range(4 * k, 4 * k + 4) for k in range(12)]


def network(cuda, device="cuda:0", begun=None):
    """Index i => an image of i, label 2 i, score 3 i. Its weight is still on its way when the network is handed out."""
    weight = cuda.upload(torch.ones(()), device)

    def synthesize(indices):
        if begun is not None:
            begun.append(indices)
        i_B = cuda.upload(torch.tensor(indices).float(), device) * weight
        images = i_B[:, None, None, None].expand(-1, 3, 2, 2) * 1
        labels = (i_B * 2)[:, None, None].expand(-1, 2, 2).long()
        return LabelledBatch(images, labels, i_B * 3, torch.tensor(indices), indices[-1] + 1)

    return synthesize


def copy_of(chunk):
    with chunk.reading() as batch:
        return LabelledBatch.concatenate([batch], next_index=0)


def memory(tensor):
    return getattr(tensor, "memory", tensor)


def is_right(indices, scores, copy) -> bool:
    i = torch.tensor(indices)
    return (
        scores == [3.0 * index for index in indices]
        and torch.equal(memory(copy.images), i.float()[:, None, None, None].expand(-1, 3, 2, 2))
        and torch.equal(memory(copy.labels), 2 * i[:, None, None].expand(-1, 2, 2))
        and torch.equal(memory(copy.uncertainty), 3.0 * i)
        and torch.equal(copy.indices, i)
    )


def train(cuda, monkeypatch, device=CUDA, output=None, steps=10):
    """Consume `steps` chunks, drop the rest, let everything finish; whether all that was seen was right."""
    cuda.patch(monkeypatch)
    chunks = prefetch(network(cuda, str(device)), CHUNKS, device, output)
    seen = []
    for step, chunk in enumerate(itertools.islice(chunks, steps)):
        cuda.current[CUDA_0] = Stream(cuda, "consumer")  # another one at every step
        copy = copy_of(chunk)
        seen.append((CHUNKS[step], chunk.scores(), copy))
    del chunk, chunks
    cuda.drain()
    return all(is_right(*item) for item in seen) and len(seen) == steps


# Correctness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_in_whatever_order_streams_work_a_consumer_on_changing_streams_sees_finished_chunks(monkeypatch, policy):
    assert train(LateCuda(POLICIES[policy]()), monkeypatch)


@pytest.mark.parametrize("rule", ["weights", "host waits", "consumer waits", "side waits", "allocator"])
def test_without_any_one_of_the_rules_the_consumer_would_see_wrong_data(monkeypatch, rule):
    results = []
    for policy in POLICIES.values():
        with monkeypatch.context() as patch:
            results.append(train(LateCuda(policy(), forget=rule), patch))
    assert not all(results)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_gpu_synthesizes_for_another(monkeypatch, policy):
    assert train(LateCuda(POLICIES[policy]()), monkeypatch, CUDA_1, CUDA_0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_synthesizes_for_the_cpu(monkeypatch, policy):
    assert train(LateCuda(POLICIES[policy]()), monkeypatch, CUDA_0, CPU)


# What runs ahead, and how far ----------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """Nothing happens before the host waits for it."""
    cuda = LateCuda()
    cuda.patch(monkeypatch)
    return cuda


def test_every_chunk_is_handed_out_once_in_order(cuda):
    assert [c.indices for c in prefetch(network(cuda), CHUNKS, CUDA)] == CHUNKS
    assert list(prefetch(network(cuda), [], CUDA)) == []


def test_later_chunks_are_enqueued_before_the_host_waits_for_the_first_and_no_more(cuda):
    begun = []
    endless = (range(k, k + 4) for k in itertools.count(0, 4))
    chunks = prefetch(network(cuda, begun=begun), endless, CUDA)
    for handed_out in range(1, 6):
        next(chunks)
        assert len(begun) == handed_out + CHUNKS_IN_FLIGHT - 1


def test_the_host_waits_for_the_chunk_whose_scores_it_reads_and_for_nothing_later(cuda):
    chunk = next(prefetch(network(cuda), CHUNKS, CUDA))
    (side,) = (stream for stream in cuda.streams if stream.name == "side")
    before = len(side.queue)
    assert chunk.scores() == [0.0, 3.0, 6.0, 9.0]
    assert 0 < before // CHUNKS_IN_FLIGHT <= len(side.queue) < before


def test_reading_asks_nothing_of_the_host(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "force", lambda event: pytest.fail("the host waited"))
    for chunk in prefetch(network(cuda), CHUNKS, CUDA):
        copy_of(chunk)


def test_the_ring_stops_growing_and_each_kept_chunk_adds_one_slot(cuda):
    for held in (1, 5):
        cuda.allocated = 0
        window = []
        for chunk in prefetch(network(cuda), CHUNKS * 5, CUDA):
            window = [*window, chunk][-held:]
        slots = cuda.allocated // len(copy_of(chunk).tensors())
        assert CHUNKS_IN_FLIGHT <= slots <= CHUNKS_IN_FLIGHT + held + 1


def test_a_chunk_that_is_kept_keeps_its_memory(cuda):
    kept = list(itertools.islice(prefetch(network(cuda), CHUNKS, CUDA), 9))
    seen = [(chunk.indices, chunk.scores(), copy_of(chunk)) for chunk in kept]
    cuda.drain()
    assert all(is_right(*item) for item in seen)


def test_the_side_stream_has_a_priority_above_the_consumers(cuda, monkeypatch):
    priorities = []
    make = torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda d, priority: priorities.append(priority) or make(d, priority))
    next(prefetch(network(cuda), CHUNKS, CUDA))
    assert priorities == [-1]


def test_copies_between_gpus_leave_the_consumers_stream_alone(cuda):
    consumer = cuda.current[CUDA_0]
    chunk = next(prefetch(network(cuda, "cuda:1"), CHUNKS, CUDA_1, CUDA_0))
    assert not consumer.queue
    copy_of(chunk)
    assert consumer.queue


def test_the_ring_can_be_written_again_after_inference_mode():
    with torch.inference_mode():
        assert not module._empty_like(torch.zeros(2), torch.device("meta")).is_inference()


def test_cuda_and_its_current_device_by_number_are_the_same(cuda):
    next(prefetch(network(cuda), CHUNKS, CUDA, CUDA_0))
    assert [stream.name for stream in cuda.streams].count("side") == 1


def test_networks_that_one_reader_prepares_are_ready_for_the_next_on_another_stream(cuda):
    with module.side_stream(CUDA):
        synthesize = network(cuda)
    cuda.current[CUDA_0] = Stream(cuda, "another consumer")
    chunk = next(prefetch(synthesize, CHUNKS, CUDA))
    seen = chunk.indices, chunk.scores(), copy_of(chunk)
    cuda.drain()
    assert is_right(*seen)


def test_readings_one_by_one_share_one_stream_and_so_the_memory_kept_for_it(cuda):
    synthesize = network(cuda)
    for chunk in CHUNKS[:5]:
        next(prefetch(synthesize, [chunk], CUDA))
    assert [stream.name for stream in cuda.streams].count("side") == 1


# Errors and endings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_an_error_reaches_the_consumer_after_the_chunks_before_it_and_says_where_it_arose(cuda, device, bad):
    healthy, begun = network(cuda), []

    def synthesize(indices):
        begun.append(indices)
        if indices == CHUNKS[bad]:
            raise ValueError("no such sample")
        if device == CUDA:
            return healthy(indices)
        return LabelledBatch(*[torch.zeros(4)] * 3, torch.tensor(indices), 0)

    chunks = prefetch(synthesize, CHUNKS, device)
    assert [next(chunks).indices for _ in range(bad)] == CHUNKS[:bad]
    with pytest.raises(ValueError, match="no such sample") as caught:
        next(chunks)
    assert caught.value.__notes__ == [f"while the samples {4 * bad} to {4 * bad + 3} were being synthesized"]
    assert begun == CHUNKS[: bad + 1]
    assert next(chunks, None) is None


def test_an_error_that_waits_for_its_turn_holds_no_tensors(cuda):
    healthy, held = network(cuda), []

    def synthesize(indices):
        if indices != CHUNKS[1]:
            return healthy(indices)
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        try:
            raise MemoryError("first")
        except MemoryError:
            raise RuntimeError("out of memory") from None

    chunks = prefetch(synthesize, CHUNKS, CUDA)
    next(chunks)
    assert held[0]() is None
    with pytest.raises(RuntimeError, match="out of memory"):
        next(chunks)


def test_an_error_of_the_device_says_which_samples_the_host_was_waiting_for(cuda, monkeypatch):
    chunk = next(prefetch(network(cuda), CHUNKS, CUDA))

    def fail(event):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "force", fail)
    with pytest.raises(RuntimeError, match="illegal memory") as caught:
        chunk.scores()
    assert caught.value.__notes__ == ["while the samples 0 to 3 were being synthesized"]


def test_closing_in_the_middle_stops_the_work_and_frees_the_ring(cuda):
    begun = []
    chunks = prefetch(network(cuda, begun=begun), CHUNKS, CUDA)
    copy = copy_of(next(chunks))
    chunks.close()
    assert len(begun) == CHUNKS_IN_FLIGHT
    assert not cuda.claims, "memory that was read has gone back to the allocator"
    cuda.drain()
    assert torch.equal(memory(copy.uncertainty), torch.tensor([0.0, 3.0, 6.0, 9.0]))


def test_on_a_cpu_nothing_runs_ahead():
    begun = []

    def synthesize(indices):
        begun.append(indices)
        return LabelledBatch(*[torch.tensor(indices).float()] * 3, torch.tensor(indices), 0)

    for number, chunk in enumerate(prefetch(synthesize, CHUNKS, CPU)):
        assert begun == CHUNKS[: number + 1]
        assert chunk.indices == CHUNKS[number] and chunk.scores() == list(CHUNKS[number])


def test_chunks_are_larger_on_cuda():
    assert default_chunk_size(CPU) == 4
    assert default_chunk_size(CUDA) == 16


# On a GPU ------------------------------------------------------------------------------------------------------


def slow_network(chunk):
    """Each chunk is written by a long chain of kernels."""
    images = torch.zeros(2, 3, 512, 512, device="cuda")
    for _ in range(200):
        images += 1
    scores = torch.full((2,), float(chunk[0]), device="cuda")
    return LabelledBatch(images, images[:, 0].long(), scores, torch.tensor(chunk), chunk[-1] + 1)


@pytest.mark.gpu
def test_on_a_gpu_a_consumer_on_any_stream_sees_finished_chunks():
    streams = [torch.cuda.Stream() for _ in range(3)]
    chunks = prefetch(slow_network, [[2 * k, 2 * k + 1] for k in range(30)], CUDA)
    for step, chunk in enumerate(chunks):
        with torch.cuda.stream(streams[step % 3]):
            total = copy_of(chunk).images.sum()
        assert total.item() == 200 * 2 * 3 * 512 * 512
        assert chunk.scores() == [2.0 * step] * 2


@pytest.mark.gpu
def test_on_a_gpu_memory_stays_flat():
    def peak(count):
        torch.cuda.reset_peak_memory_stats()
        for chunk in prefetch(slow_network, [[2 * k, 2 * k + 1] for k in range(count)], CUDA):
            copy_of(chunk)
        return torch.cuda.max_memory_allocated()

    peak(5)
    assert peak(100) <= peak(10)


@pytest.mark.gpu
def test_on_a_gpu_an_interpreter_that_exits_in_the_middle_exits_quietly():
    code = (
        "from handsoff_stream import HandsOffStream\n"
        "batches = iter(HandsOffStream('faces', batch_size=8, device='cuda'))\n"
        "print(len(next(batches)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "8\n", "")


@pytest.mark.gpu
def test_on_a_gpu_no_stage_of_the_synthesis_waits_for_the_device():
    synthesize = Synthesizer(load_checkpoint("faces"), SynthesisOptions(precision="fast"), CUDA)
    synthesize(range(16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chunk in prefetch(synthesize, [range(16 * k, 16 * k + 16) for k in range(5)], CUDA):
            copy_of(chunk)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_a_stream_gives_what_the_synthesizer_gives_when_everything_waits():
    stream = HandsOffStream("faces", device="cuda", batch_size=24)
    batches = [batch.to("cpu") for batch in itertools.islice(stream, 8)]
    synthesize = Synthesizer(load_checkpoint("faces"), stream.options, CUDA)
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            whole = synthesize(range(index // 16 * 16, index // 16 * 16 + 16)).to("cpu")
            assert torch.equal(batch.images[row], whole.images[index % 16])
            assert torch.equal(batch.labels[row], whole.labels[index % 16])
