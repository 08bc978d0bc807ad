"""What a user may write; test_user_script.py runs strict type checkers over it. It is never executed."""

import json
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from handsoff_stream import (
    BlockQuantile,
    Checkpoint,
    HandsOffStream,
    LabelledBatch,
    Shard,
    load_checkpoint,
    merge_states,
    mix,
)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return nn.functional.cross_entropy(logits, labels)


def train_on_samples(model: nn.Module, device: torch.device) -> float:
    """Samples, collated by the loader."""
    stream = HandsOffStream(
        "faces",
        seed=7,
        filter="block",
        noise="random",
        score="sum",
        precision="exact",
        kernel="torch",
        epoch_size=1000,
        shard=Shard(0, 2),
    )
    total = 0.0
    images: Tensor
    labels: Tensor
    for images, labels in DataLoader(stream, batch_size=8, num_workers=2):  # collated: their types are the loader's
        total += loss_of(model, images.to(device), labels.to(device)).item()
    return total / len(stream)


def train_on_batches(model: nn.Module, path: Path, saved: Path) -> None:
    """Whole batches of a checkpoint in memory; continues where the last run ended, with another number of ranks."""
    checkpoint: Checkpoint = load_checkpoint(path)
    stream = HandsOffStream(checkpoint, batch_size=8, filter=BlockQuantile(), device="cpu", transforms=None)
    states: list[dict[str, Any]] = json.loads(saved.read_text())
    stream.load_state_dict(merge_states(states))
    for batch in stream:
        assert_type(batch, LabelledBatch)
        assert isinstance(batch.labels, Tensor), "a checkpoint with several heads gives a dict"
        loss_of(model, batch.images, batch.labels)
        print(batch.next_index, batch.uncertainty.max().item(), int(batch.indices[0]))
        saved.write_text(json.dumps([stream.state_dict()]))


def train_on_a_mixture(model: nn.Module, labelled: list[tuple[Tensor, Tensor]]) -> None:
    """Batches of a stream and of labelled images."""
    for batch in mix(HandsOffStream("faces", batch_size=8), labelled, share=0.25):
        assert_type(batch, LabelledBatch)
        assert isinstance(batch.labels, Tensor)
        loss_of(model, batch.images, batch.labels)


def look_at_some(stream: HandsOffStream[dict[str, Any]]) -> LabelledBatch:
    """Samples by name, by index, and a batch by a slice."""
    assert_type(stream[7], dict[str, Any])
    image, label = HandsOffStream("faces")[7]
    assert_type(image, Tensor)
    assert_type(label, Tensor | dict[str, Tensor])
    return stream[7:9]


look_at_some(HandsOffStream("faces", as_dict=True).take(100))
