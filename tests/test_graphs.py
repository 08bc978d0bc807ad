"""A graphed synthesizer gives the samples of the plain one, bit for bit; here a tape of operators is the graph."""

import itertools
import weakref

import pytest
import torch
from conftest import assert_same, make_checkpoint

from benchmarks.gpu.operator_tape import GARBAGE, OperatorTape, record_on_tape
from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.geometry import Rectangle
from handsoff_stream.graphs import MAX_SHAPES, GraphedSynthesizer
from handsoff_stream.label_generator import LabelGenerator, rows, tiles
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Depth, Keypoints

CPU = torch.device("cpu")


class CountedTape:
    """The tape, and how often it was asked to record and to repeat."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run, device):
        replay, batch = record_on_tape(run, device)
        self.recorded += 1

        def counted():
            self.replayed += 1
            replay()

        return counted, batch


def with_more_heads(checkpoint):
    """Also keypoints and depth: labels of three kinds, and two that are not packed into bytes."""
    torch.manual_seed(1)
    channels = checkpoint.generator.feature_channels
    heads = {name: head for name, head in checkpoint.heads.items()}
    for name, task in (("points", Keypoints(("nose", "chin"))), ("depth", Depth())):
        label_generator = LabelGenerator(channels, hidden=(7, 5), num_outputs=task.num_outputs, members=2)
        heads[name] = Head(task, label_generator.eval().requires_grad_(False))
    return Checkpoint(checkpoint.generator, heads)


CHECKPOINTS = {
    "one head": lambda: make_checkpoint(num_calibration=4),
    "three heads": lambda: with_more_heads(make_checkpoint(num_calibration=4)),
    "cropped": lambda: make_checkpoint(num_calibration=4).cropped(Rectangle(4, 0, 12, 16)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("noise", ["const", "none", "random"])
def test_every_chunk_has_the_bits_of_the_plain_synthesizer(name, noise):
    plain = Synthesizer(CHECKPOINTS[name](), SynthesisOptions(seed=3, noise=noise), CPU)
    tape = CountedTape()
    graphed = GraphedSynthesizer(plain, tape)
    chunks = [range(4 * k, 4 * k + 4) for k in (0, 1, 7, 1, 2**40)]
    batches = [graphed(chunk) for chunk in chunks]  # all held: none may be overwritten by a later one
    for chunk, batch in zip(chunks, batches, strict=True):
        assert_same(batch.unpacked(), plain(chunk))
        assert batch.indices.tolist() == list(chunk) and batch.next_index == chunk.stop
    assert (tape.recorded, tape.replayed) == (1, 5)


def test_a_stream_of_graphed_chunks_is_the_stream(checkpoint):
    options = {"seed": 2, "batch_size": 3, "device": "cpu"}
    stream = HandsOffStream(checkpoint, **options)
    graphed = GraphedSynthesizer(Synthesizer(checkpoint, stream.options, CPU), record_on_tape)
    twin = HandsOffStream(checkpoint, synthesize=graphed, **options)
    for one, other in itertools.islice(zip(stream, twin, strict=True), 8):
        assert_same(one, other)


def test_each_shape_is_captured_once_and_shapes_beyond_the_limit_are_computed_without(checkpoint):
    plain = Synthesizer(checkpoint, SynthesisOptions(), CPU)
    tape = CountedTape()
    graphed = GraphedSynthesizer(plain, tape)
    sizes = [*range(1, MAX_SHAPES + 3), 2, 1]
    for size in sizes:
        assert_same(graphed(range(size)).unpacked(), plain(range(size)))
    assert tape.recorded == MAX_SHAPES
    assert tape.replayed == sum(size <= MAX_SHAPES for size in sizes)


def test_a_capture_inside_inference_mode_serves_chunks_outside_of_it(checkpoint):
    plain = Synthesizer(checkpoint, SynthesisOptions(), CPU)
    graphed = GraphedSynthesizer(plain, record_on_tape)
    with torch.inference_mode():
        graphed(range(4))
    batch = graphed(range(4, 8))
    assert_same(batch.unpacked(), plain(range(4, 8)))
    assert not batch.images.is_inference()


def test_without_a_replay_the_results_are_garbage(checkpoint):
    """The tape computes nothing while it records, so the tests above see it if a replay is left out."""
    graphed = GraphedSynthesizer(
        Synthesizer(checkpoint, SynthesisOptions(), CPU),
        lambda run, device: (lambda: None, record_on_tape(run, device)[1]),
    )
    assert (graphed(range(4)).images == GARBAGE).all()


@pytest.mark.parametrize("graphed", [True, False])
def test_cached_tables_outlive_their_cache_if_a_graph_reads_them(checkpoint, monkeypatch, graphed):
    """A graph reads them at their addresses, whoever else has forgotten them."""
    found = []

    def watched(*arguments):
        table = tiles.slots(*arguments)
        found.append(weakref.ref(table.row_N))
        return table

    monkeypatch.setattr(rows, "slots", watched)
    plain = Synthesizer(checkpoint, SynthesisOptions(), CPU)
    synthesizer = GraphedSynthesizer(plain, lambda run, device: (lambda: None, run())) if graphed else plain
    synthesizer(range(4))
    tiles.slots.cache_clear()
    assert found and all((table() is not None) == graphed for table in found)


class Stamped(Synthesizer):
    """Adds a number that Python makes anew for each chunk."""

    def compute(self, z, *maps):
        images, labels, uncertainty = super().compute(z, *maps)
        self.chunks = getattr(self, "chunks", 0) + 1
        return images, labels, uncertainty + torch.tensor([float(self.chunks)])


def test_work_with_numbers_made_on_the_host_for_each_chunk_is_refused(checkpoint):
    stamped = Stamped(checkpoint, SynthesisOptions(), CPU)
    with pytest.raises(RuntimeError, match="made on the host at each call, the first of shape"):
        GraphedSynthesizer(stamped, record_on_tape)(range(4))


class Waiting(Synthesizer):
    """Decides by a value of a tensor."""

    def compute(self, z, *maps):
        images, labels, uncertainty = super().compute(z, *maps)
        return images, labels, uncertainty if uncertainty.sum() > 0 else -uncertainty


def test_an_error_of_the_capture_says_how_to_do_without(checkpoint):
    waiting = Waiting(checkpoint, SynthesisOptions(), CPU)
    with pytest.raises(RuntimeError, match="reads values on the host") as raised:
        GraphedSynthesizer(waiting, record_on_tape)(range(4))
    assert "graphs=False does without" in raised.value.__notes__[0]


def test_the_tape_repeats_views_writes_and_lists_of_results():
    source, out = torch.arange(6.0), torch.zeros(3)
    with OperatorTape() as tape:
        low, high = (source * 2).split(3)
        torch.add(low, high, out=out)
        values, order = high.neg().topk(2)
        low.mul_(10)
    source.copy_(torch.tensor([5.0, 4, 3, 2, 1, 0]))
    out.zero_()
    tape.replay()
    assert out.tolist() == [14.0, 10.0, 6.0]
    assert (values.tolist(), order.tolist(), low.tolist()) == ([0.0, -2.0], [2, 1], [100.0, 80.0, 60.0])


def test_graphs_on_a_cpu_are_refused(checkpoint):
    with pytest.raises(ValueError, match='the device is "cpu"; leave it out, or pass a GPU'):
        HandsOffStream(checkpoint, device="cpu", graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("noise", ["const", "random"])
def test_on_a_gpu_a_graphed_stream_gives_the_bits_of_the_plain_one(precision, noise):
    options = {"batch_size": 24, "device": "cuda", "precision": precision, "noise": noise}
    streams = HandsOffStream("faces", **options), HandsOffStream("faces", graphs=True, **options)
    for one, other in itertools.islice(zip(*streams, strict=True), 8):
        assert_same(one.to("cpu"), other.to("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_replays_need_no_more_memory_than_the_capture():
    stream = HandsOffStream("faces", batch_size=16, device="cuda", graphs=True)
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    for _ in range(100):
        next(batches)
    assert torch.cuda.memory_reserved() <= before
