"""Lightning: an interrupted run goes on with the very next sample, on one process or several.

python examples/integrations/lightning_resume.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from handsoff_stream import HandsOffStream, LabelledBatch
from handsoff_stream.outlets.lightning_callback import StreamPosition
from handsoff_stream.outlets.loader import HandsOffLoader


class Segmenter(LightningModule):
    """One convolution; remembers the indices of the samples that it was trained on."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, classes, 3, padding=1)
        self.trained: list[int] = []

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        images, labels = batch
        self.trained += batch.indices.tolist()
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(
    stream: HandsOffStream[LabelledBatch], folder: Path, steps: int, workers: int = 0, **options: Any
) -> list[int]:
    """Train until `steps`, from the checkpoint in the folder if there is one; the indices of the samples seen."""
    loader = HandsOffLoader(stream, num_workers=workers)
    saved = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    callbacks = [StreamPosition(loader), saved]
    trainer = Trainer(max_steps=steps, callbacks=callbacks, logger=False, enable_progress_bar=False, **options)
    model = Segmenter(len(stream.class_names))
    last = folder / "last.ckpt"
    trainer.fit(model, loader, ckpt_path=str(last) if last.exists() else None)
    return model.trained


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for steps in (2, 4):
            print(train(HandsOffStream("faces", batch_size=4), Path(folder), steps))
