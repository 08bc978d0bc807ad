"""Accelerate: every rank synthesises its own samples, and save_state / load_state resume all of them exactly.

python examples/integrations/accelerate_loop.py
accelerate launch --num_processes 2 --cpu examples/integrations/accelerate_loop.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from handsoff_stream import HandsOffStream, LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.ranks import AllRanks


def train(stream: HandsOffStream[LabelledBatch], folder: Path, steps: int, workers: int = 0) -> list[int]:
    """Train for `steps`, from the state in the folder if there is one; the indices of the samples seen by this rank."""
    accelerator = Accelerator()
    model = nn.Conv2d(3, len(stream.class_names), 3, padding=1)
    loader = HandsOffLoader(stream, num_workers=workers)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    accelerator.register_for_checkpointing(AllRanks(loader))
    if (folder / "state").exists():
        accelerator.load_state(str(folder / "state"))
    trained: list[int] = []
    for _, batch in zip(range(steps), loader, strict=False):
        images, labels = batch.to(accelerator.device)
        trained += batch.indices.tolist()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder / "state"))
    return trained


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])  # one folder for all ranks
        for _ in range(2):
            print(train(HandsOffStream("faces", batch_size=4), Path(folder), steps=2))
        Accelerator().wait_for_everyone()
