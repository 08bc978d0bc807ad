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

    The last images may be samples that a network has labelled. They are drawn in addition: the labelled images get as
    many draws as without them, which then are the given share of all. Pixels are held out of labelled images only.

    Args:
        targets: [N, H, W] or [N, H, W, K]; int64 ones are ids.
        num_outputs: number of ids.
        members: M; each gets pixels of its own.
        pixels_per_image: that a member sees in an epoch, times the labelled images; drawn with replacement.
        batch_size: P.
        held_out: share of the labelled images' labelled pixels never to be drawn, at most `MAX_HELD_OUT` pixels.
        seed: decides everything.
        num_samples: how many of the images, at the end, are samples.
        labelled_share: share of the draws that come from labelled images, rounded up; in (0, 1]. Not used without
            samples.

    Raises:
        ValueError: no pixel has a label, or an epoch has fewer pixels than there are regions, of labelled images or
            of samples.
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
        num_samples: int = 0,
        labelled_share: float = 1.0,
    ) -> None:
        self.members, self.batch_size = members, batch_size
        self.random = torch.Generator().manual_seed(seed)
        num_labelled = len(targets) - num_samples
        labelled, region = _regions(targets, num_outputs)
        of_images = labelled < num_labelled * targets.shape[1] * targets.shape[2]
        share = 1.0 if of_images.all() else labelled_share
        self.epoch_steps = math.ceil(num_labelled * pixels_per_image / share / batch_size)
        if not of_images.any():
            raise ValueError(
                f"no pixel has a label: all ids lie outside [0, {num_outputs}), or no number is finite; check them"
            )
        # The first pixel of a region is always trained on, however few there are.
        spare = 1 + torch.nonzero((region[1:] == region[:-1]) & of_images[1:]).flatten()
        count = min(int(held_out * int(of_images.sum())), MAX_HELD_OUT)
        chosen = torch.randperm(len(spare), generator=self.random)[:count]
        kept = torch.ones(len(labelled), dtype=torch.bool)
        kept[spare[chosen]] = False
        self.held_out, self.pool = labelled[~kept], labelled[kept]
        """int64, flat: the pixels never drawn, and those that are."""
        self.region_sizes = torch.unique_consecutive(region[kept], return_counts=True)[1]
        self.region_starts = self.region_sizes.cumsum(0) - self.region_sizes
        drawn = self.epoch_steps * batch_size
        draws = math.ceil(share * drawn)
        end = int(of_images[kept].sum())  # regions ascend, so those of samples come last
        self.parts = [self._part(0, end, draws)]
        """(first, end) in the pool, and draws beside one of each region: of labelled images, and of any samples."""
        if end < len(self.pool):
            self.parts.append(self._part(end, len(self.pool), drawn - draws))

    def _part(self, first: int, end: int, draws: int) -> tuple[int, int, int]:
        regions = int(((self.region_starts >= first) & (self.region_starts < end)).sum())
        if draws < regions:
            raise ValueError(
                f"{regions} labelled regions do not fit into the {draws} pixels of an epoch; raise pixels_per_image"
            )
        return first, end, draws - regions

    def epoch(self) -> Iterator[Tensor]:
        """The pixels of each step, int64 [M, P], independent for each member; every region at least once per epoch."""
        pixels_ME = torch.stack([self._member_epoch() for _ in range(self.members)])
        yield from pixels_ME.split(self.batch_size, dim=1)

    def _member_epoch(self) -> Tensor:
        random, regions = self.random, len(self.region_sizes)
        offset = (torch.rand(regions, generator=random, dtype=torch.float64) * self.region_sizes).long()
        anywhere = [torch.randint(first, end, (draws,), generator=random) for first, end, draws in self.parts]
        chosen = self.pool[torch.cat([self.region_starts + offset, *anywhere])]
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
