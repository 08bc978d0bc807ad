"""The published training of a label generator, plainly: what fitting is measured against, on the same labels.

Written from a description of the released code of HandsOff and DatasetGAN, not from their code:

    every latent => feature maps => every map resized to label size, rounded to float16 => one float32 matrix with a row
    for every pixel of every image => the members, one after another: all rows shuffled, minibatches of 64, Adam at
    0.001, at most 100 epochs; after four, end when 50 minibatches in a row were no better than the best since

Two departures, each in its favour: the float16 matrix that the published code keeps beside the float32 one is left out,
and minibatches are taken from the matrix at once instead of row by row through a data loader.

Shape letters: N images, P pixels of a minibatch, Q all pixels, C feature channels, K classes, H W label size.
"""

import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.features import Size
from handsoff_stream.generators import Generator

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
SURE_EPOCHS = 4
MAX_WORSE_BATCHES = 50


@torch.no_grad()
def hypercolumn_matrix(generator: Generator, w_plus_NLD: Tensor, size: Size) -> Tensor:
    """float32 [N * H * W, C], all of it."""
    pixels = size[0] * size[1]
    rows_QC = torch.empty(len(w_plus_NLD) * pixels, sum(generator.feature_channels))
    for i, w_plus_1LD in enumerate(w_plus_NLD.split(1)):
        hypercolumn_1CHW = generator.synthesis(w_plus_1LD, "const").features.hypercolumn(size)
        rows_QC[i * pixels : (i + 1) * pixels] = hypercolumn_1CHW[0].half().flatten(1).t()
    return rows_QC


def make_member(channels: int, hidden: tuple[int, int], classes: int, random: torch.Generator) -> nn.Sequential:
    """Linear - ReLU - BatchNorm - Linear - ReLU - BatchNorm - Linear; weights N(0, 0.02), no biases at first."""
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
    """Train one member; yields (minibatches, seconds of training) so far, after each epoch.

    The clock stands still while the caller looks at the member, which is in eval mode then.
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
