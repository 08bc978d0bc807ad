"""PyTorch's DDP with persistent DataLoader workers: epochs go on, and every rank has as many batches as the others.

python examples/integrations/torch_ddp.py
torchrun --nproc-per-node 2 examples/integrations/torch_ddp.py
"""

import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from handsoff_stream import HandsOffStream, LabelledBatch


def train(stream: HandsOffStream[LabelledBatch], epochs: int, workers: int = 0) -> list[list[int]]:
    """The indices of the samples that this rank saw, by epoch."""
    model: nn.Module = nn.Conv2d(3, len(stream.class_names), 3, padding=1)
    if torch.distributed.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    trained: list[list[int]] = []
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        trained.append([])
        for batch in loader:
            images, labels = batch
            trained[-1] += batch.indices.tolist()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return trained


if __name__ == "__main__":
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    print(train(HandsOffStream("faces", batch_size=4, epoch_size=12), epochs=2, workers=1))
