"""Fixtures that several test files share: a complete, tiny checkpoint, and a check of exact resuming."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread per process, before torch is imported and in the processes that tests start: tiny tensors gain nothing from
# more, and idle OpenMP threads that spin slow down a busy machine tenfold.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Calibration, Checkpoint, Head, save_checkpoint
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation

CLASSES = ("background", "skin", "hair")
PALETTE = ((0, 0, 0), (255, 200, 150), (90, 60, 30))


def make_checkpoint(seed: int = 0, num_calibration: int = 200) -> Checkpoint:
    """Random weights, 16x16 images, 3 classes, 3 members: every part is real, only small."""
    torch.manual_seed(seed)
    generator = StyleGAN2(channels=(6, 5, 4), z_dim=8, w_dim=8, mapping_layers=2)
    with torch.no_grad():
        generator.w_avg.normal_(std=0.1)
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
    labels = LabelGenerator(generator.feature_channels, hidden=(7, 5), num_outputs=3, members=3)
    head = Head(Segmentation(CLASSES, PALETTE), labels.eval().requires_grad_(False))
    checkpoint = Checkpoint(generator.eval().requires_grad_(False), {"segmentation": head})
    options = SynthesisOptions(seed=12345)
    batch = Synthesizer(checkpoint, options, torch.device("cpu"))(range(num_calibration))
    calibration = Calibration(options.calibrated_by(), {"top10_mean": batch.uncertainty.tolist()})
    return Checkpoint(checkpoint.generator, checkpoint.heads, calibration=calibration)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return make_checkpoint()


@pytest.fixture(scope="session")
def checkpoint_path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, checkpoint)
    return path


def flatten(item: Any) -> Iterator[torch.Tensor]:
    """All tensors of a sample or a batch."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from flatten(value)
    elif isinstance(item, LabelledBatch):
        yield from flatten((item.images, item.labels, item.uncertainty, item.indices))
    else:
        for value in item:
            yield from flatten(value)


def assert_same(left: Any, right: Any) -> None:
    """Bitwise equality, shapes and dtypes included."""
    for a, b in zip(flatten(left), flatten(right), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def take(iterable: Any, count: int) -> list[Any]:
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]


def assert_resumes_exactly(make: Callable[[], HandsOffStream], steps: int) -> None:
    """State after every step, through JSON, into a fresh stream: the rest is bitwise what it would have been."""
    stream = make()
    states, items = [stream.state_dict()], []
    for item in iter(stream):
        items.append(item)
        states.append(json.loads(json.dumps(stream.state_dict())))
        if len(items) == steps:
            break
    for step, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest = take(resumed, len(items) - step)
        assert_same(rest, items[step:])
        assert resumed.state_dict() == (states[-1] if rest else state)
