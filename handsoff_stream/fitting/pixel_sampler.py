"""Which pixels each member of an ensemble sees, step by step.

Knows where labels are. Does not know features, networks or losses.

Shape letters: N images, M members, P pixels of a minibatch, E pixels of an epoch, H W label size.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_HELD_OUT = 16_384  # measures an accuracy to less than half a percent, in less time than an epoch takes


class PixelSampler:
    """Minibatches of flat indices into [N, H, W] labels. The same seed gives the same pixels.

    Where targets are ids, an id outside [0, num_outputs) means unlabelled, and every pair of an image and an
    id in it is a region. Where targets are numbers, a pixel without a finite number is unlabelled, and each image is
    one region.

    Args:
        targets: [N, H, W] or [N, H, W, K]; int64 ones are ids.
        num_outputs: number of ids.
        members: M; each gets pixels of its own.
        pixels_per_image: that a member sees in an epoch, times N; drawn with replacement.
        batch_size: P.
        held_out: share of the labelled pixels never to be drawn, at most `MAX_HELD_OUT` pixels.
        seed: decides everything.

    Raises:
        ValueError: no pixel has a label, or an epoch has fewer pixels than there are regions.
    """

    def __init__(
        self,
        targets: Tensor,
        num_outputs: int,
        *,
        members: int,
        pixels_per_image: int,
        batch_size: int,
        held_out: float,
        seed: int,
    ) -> None:
        self.members, self.batch_size = members, batch_size
        self.random = torch.Generator().manual_seed(seed)
        self.epoch_steps = math.ceil(len(targets) * pixels_per_image / batch_size)
        labelled, region = _regions(targets, num_outputs)
        if len(labelled) == 0:
            raise ValueError(
                f"no pixel has a label: all ids lie outside [0, {num_outputs}), or no number is finite; check them"
            )
        # The first pixel of a region is always trained on, however few there are.
        spare = 1 + torch.nonzero(region[1:] == region[:-1]).flatten()
        count = min(int(held_out * len(labelled)), MAX_HELD_OUT)
        chosen = torch.randperm(len(spare), generator=self.random)[:count]
        kept = torch.ones(len(labelled), dtype=torch.bool)
        kept[spare[chosen]] = False
        self.held_out, self.pool = labelled[~kept], labelled[kept]
        """int64, flat: the pixels never drawn, and those that are."""
        self.region_sizes = torch.unique_consecutive(region[kept], return_counts=True)[1]
        self.region_starts = self.region_sizes.cumsum(0) - self.region_sizes
        drawn = self.epoch_steps * batch_size
        if drawn < len(self.region_sizes):
            raise ValueError(
                f"{len(self.region_sizes)} labelled regions do not fit into the {drawn} pixels of an epoch; "
                "raise pixels_per_image"
            )

    def epoch(self) -> Iterator[Tensor]:
        """The pixels of each step, int64 [M, P], independent for each member; every region at least once per epoch."""
        pixels_ME = torch.stack([self._member_epoch() for _ in range(self.members)])
        yield from pixels_ME.split(self.batch_size, dim=1)

    def _member_epoch(self) -> Tensor:
        random, regions = self.random, len(self.region_sizes)
        offset = (torch.rand(regions, generator=random, dtype=torch.float64) * self.region_sizes).long()
        rest = self.epoch_steps * self.batch_size - regions
        anywhere = torch.randint(len(self.pool), (rest,), generator=random)
        chosen = self.pool[torch.cat([self.region_starts + offset, anywhere])]
        return chosen[torch.randperm(len(chosen), generator=random)]


def _regions(targets: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
    """(flat pixel int64, region int32) of all labelled pixels, regions together and ascending."""
    pixels = targets.shape[1] * targets.shape[2]
    if targets.dtype != torch.int64:
        known = targets.isfinite().reshape(len(targets) * pixels, -1).any(dim=1)
        labelled = torch.nonzero(known).flatten().cpu()
        return labelled, (labelled // pixels).int()
    ids = targets.flatten().cpu()
    labelled = torch.nonzero((ids >= 0) & (ids < num_outputs)).flatten()
    region = (labelled // pixels * num_outputs + ids[labelled]).int()
    region, order = torch.sort(region, stable=True)
    return labelled[order], region
