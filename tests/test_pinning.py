"""Page-locked memory: batches leave alone what lies on a device, and samples that cannot are refused by name."""

import dataclasses

import pytest
import torch
from late_cuda import LateCuda
from processes import fake_stream, synthesize
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from handsoff_stream.errors import StreamError
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.stream import HandsOffStream

no_accelerator = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")


def test_torch_asks_a_batch_which_pins_what_lies_on_the_cpu_and_nothing_else(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tensor) or tensor.clone())
    batch = dataclasses.replace(synthesize(range(4)), images=torch.empty(4, 3, 2, 2, device="meta"))
    pinned = pin_memory({"batch": batch}, "cuda")["batch"]
    assert pinned.images is batch.images
    assert [id(tensor) for tensor in asked] == [id(batch.labels), id(batch.uncertainty)]
    assert torch.equal(pinned.labels, batch.labels) and pinned.labels is not batch.labels


def cuda_stream(checkpoint, monkeypatch, **options) -> HandsOffStream:
    """On a simulated CUDA device."""
    cuda = LateCuda(lambda stream: True)
    cuda.patch(monkeypatch)

    def there(indices):
        return synthesize(indices).map(lambda tensor: cuda.upload(tensor.contiguous()))

    return HandsOffStream(checkpoint, device="cuda", chunk_size=4, filter=None, synthesize=there, **options)


@no_accelerator
@pytest.mark.parametrize("batch_size", [4, None])
def test_a_dataloader_that_would_pin_cuda_samples_is_refused_with_the_remedy(checkpoint, monkeypatch, batch_size):
    loader = DataLoader(cuda_stream(checkpoint, monkeypatch), batch_size=batch_size, pin_memory=True)
    with pytest.raises(StreamError, match=r"these lie on cuda already.*pass pin_memory=False.*batch_size="):
        next(iter(loader))


@no_accelerator
def test_what_can_be_pinned_is_iterated(checkpoint, monkeypatch):
    """Whatever a simulated device cannot pin is not fetched here: a loader is refused when its iterator is made."""

    def to_cpu(samples):
        return default_collate([tuple(tensor.memory for tensor in sample) for sample in samples])

    def make(**options):
        return cuda_stream(checkpoint, monkeypatch, **options)

    iter(DataLoader(make(batch_size=4), batch_size=None, pin_memory=True))
    iter(DataLoader(make(), batch_size=4, pin_memory=True, collate_fn=to_cpu))
    iter(DataLoader(make(), batch_size=4))
    iter(DataLoader(fake_stream(checkpoint), batch_size=4, pin_memory=True))
    assert len(next(iter(HandsOffLoader(make(), pin_memory=True)))) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["cuda", "cpu"])
def test_on_a_gpu_batches_go_through_a_pinning_dataloader(output):
    stream = HandsOffStream("faces", batch_size=4, device="cuda", output_device=output)
    batch = next(iter(DataLoader(stream, batch_size=None, pin_memory=True)))
    assert batch.images.device.type == output and (output == "cuda" or batch.images.is_pinned())


@pytest.mark.gpu
def test_on_a_gpu_samples_are_pinned_on_the_cpu_and_refused_on_cuda():
    on_cpu = HandsOffStream("faces", device="cuda", output_device="cpu")
    assert next(iter(DataLoader(on_cpu, batch_size=4, pin_memory=True)))[0].is_pinned()
    with pytest.raises(StreamError, match="pin_memory=False"):
        next(iter(DataLoader(HandsOffStream("faces", device="cuda"), batch_size=4, pin_memory=True)))
