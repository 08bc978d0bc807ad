"""A plain re-implementation of the published training of a label generator, for comparison.

Written from a description of the released code of HandsOff and DatasetGAN, not from the code itself:

1. Each latent gives feature maps; each map is resized to the label size and rounded to float16.
2. One float32 matrix holds a row for every pixel of every image.
3. The members are trained one after another, on all rows in random order, in minibatches of 64, by Adam with learning
   rate 0.001, for at most 100 epochs. After four epochs, training ends when 50 minibatches in a row have not improved
   on the best loss since then.

There are two departures, each in favor of the published training: the float16 matrix that the published code keeps
beside the float32 matrix is left out, and minibatches are read from the matrix at once instead of row by row through a
data loader.

Shape letters: N images, P pixels of a minibatch, Q all pixels, C feature channels, K classes, H W label size.
"""

import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Size

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
SURE_EPOCHS = 4
MAX_WORSE_BATCHES = 50


@torch.no_grad()
def hypercolumn_matrix(generator: Generator, w_plus_NLD: Tensor, size: Size) -> Tensor:
    """Hypercolumns of all pixels of all images, float32 [N * H * W, C].

    Args:
        generator: synthesizes with its stored noise maps.
        w_plus_NLD: float32 [N, num_ws, w_dim].
        size: (H, W) of the labels.
    """
    pixels = size[0] * size[1]
    rows_QC = torch.empty(len(w_plus_NLD) * pixels, sum(generator.feature_channels))
    for i, w_plus_1LD in enumerate(w_plus_NLD.split(1)):
        hypercolumn_1CHW = generator.synthesis(w_plus_1LD, "const").features.hypercolumn(size)
        rows_QC[i * pixels : (i + 1) * pixels] = hypercolumn_1CHW[0].half().flatten(1).t()
    return rows_QC


def make_member(channels: int, hidden: tuple[int, int], classes: int, random: torch.Generator) -> nn.Sequential:
    """One member with fresh weights: Linear, ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear.

    Weights are normal with standard deviation 0.02, drawn from `random`; biases are zero.
    """
    first, second = hidden
    member = nn.Sequential(
        nn.Linear(channels, first),
        nn.ReLU(),
        nn.BatchNorm1d(first),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.BatchNorm1d(second),
        nn.Linear(second, classes),
    )
    for layer in member:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02, generator=random)
            nn.init.zeros_(layer.bias)
    return member


def train_member(
    member: nn.Sequential, rows_QC: Tensor, targets_Q: Tensor, random: torch.Generator, *, max_epochs: int = 100
) -> Iterator[tuple[int, float]]:
    """Train one member; after each epoch, yield the number of minibatches and the seconds of training so far.

    The seconds do not include what the caller does between epochs; the member is in eval mode then.

    Args:
        member: of `make_member`; trained in place.
        rows_QC: float32 [Q, C], see `hypercolumn_matrix`.
        targets_Q: int64 [Q], class ids.
        random: order of the rows.
        max_epochs: at most so many epochs.
    """
    optimizer = torch.optim.Adam(member.parameters(), lr=LEARNING_RATE)
    steps, seconds, best, worse = 0, 0.0, math.inf, 0
    for epoch in range(max_epochs):
        started = time.perf_counter()
        member.train()
        for pixels_P in torch.randperm(len(rows_QC), generator=random).split(BATCH_SIZE):
            loss = F.cross_entropy(member(rows_QC[pixels_P]), targets_Q[pixels_P])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if epoch >= SURE_EPOCHS:
                worse = 0 if loss.item() < best else worse + 1
                best = min(best, loss.item())
            if worse == MAX_WORSE_BATCHES:
                break
        seconds += time.perf_counter() - started
        member.eval()
        yield steps, seconds
        if worse == MAX_WORSE_BATCHES:
            return
