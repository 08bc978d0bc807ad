"""What a user may write; test_user_script.py runs strict type checkers over it. It is never executed."""

import json
from pathlib import Path
from typing import Any

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
    for images, labels in DataLoader(stream, batch_size=8, num_workers=2):
        total += loss_of(model, images.to(device), labels.to(device)).item()
    return total / len(stream)


def train_on_batches(model: nn.Module, path: Path, saved: Path) -> None:
    """Whole batches of a checkpoint in memory; continues where the last run ended, with another number of ranks."""
    checkpoint: Checkpoint = load_checkpoint(path)
    stream = HandsOffStream(checkpoint, batch_size=8, filter=BlockQuantile(), device="cpu", transforms=None)
    states: list[dict[str, Any]] = json.loads(saved.read_text())
    stream.load_state_dict(merge_states(states))
    batch: LabelledBatch
    for batch in stream:
        assert isinstance(batch.labels, Tensor), "a checkpoint with several heads gives a dict"
        loss_of(model, batch.images, batch.labels)
        print(batch.next_index, batch.uncertainty.max().item(), int(batch.indices[0]))
        saved.write_text(json.dumps([stream.state_dict()]))


def look_at_one(index: int) -> tuple[int, ...]:
    image, _ = HandsOffStream("faces")[index]
    return tuple(image.shape)


def look_at_some(stop: int) -> list[int]:
    batch = HandsOffStream("faces")[0:stop]
    sample = HandsOffStream("faces", as_dict=True)[stop]
    return [*map(int, batch.indices), int(sample["index"])]
