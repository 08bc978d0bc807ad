"""Hugging Face's Trainer: every rank synthesises its own samples, and a checkpoint resumes all of them exactly.

python examples/integrations/transformers_trainer.py
torchrun --nproc-per-node 2 examples/integrations/transformers_trainer.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from handsoff_stream import HandsOffStream, LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.trainer import StreamTrainer


class Segmenter(nn.Module):
    """One convolution; remembers the indices of the samples that it was trained on."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, classes, 3, padding=1)
        self.trained: list[int] = []

    def forward(self, pixel_values: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Cross entropy and logits [B, K, H, W] of a batch."""
        self.trained += indices.tolist()
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def inputs(batch: LabelledBatch) -> dict[str, Any]:
    """A batch as the arguments of `Segmenter.forward`."""
    return {"pixel_values": batch.images, "labels": batch.labels, "indices": batch.indices}


def train(stream: HandsOffStream[LabelledBatch], folder: Path, steps: int, workers: int = 0) -> list[int]:
    """Train until `steps`, from the last checkpoint in the folder if there is one; the indices of the samples seen."""
    args = TrainingArguments(str(folder), max_steps=steps, save_steps=1, report_to="none", disable_tqdm=True)
    model = Segmenter(len(stream.class_names))
    loader = HandsOffLoader(stream, num_workers=workers)
    trainer = StreamTrainer(model, args, loader=loader, inputs=inputs)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return model.trained


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])  # one folder for all ranks
        for steps in (2, 4):
            print(train(HandsOffStream("faces", batch_size=4), Path(folder), steps))
        PartialState().wait_for_everyone()
