"""Which spans of the index line are mine: plain arithmetic on a rank x worker number.

A span is a fixed number of consecutive indices, aligned to a multiple of itself; span s belongs to shard
s % count. Knows integers. Does not know samples or filters. `detect()` is the only code that asks torch.distributed
and DataLoader workers who is running.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed
from torch.utils.data import get_worker_info


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count} does not exist; pass 0 <= index < count")

    def split(self, index: int, count: int) -> "Shard":
        """Divide this shard further: worker `index` of `count` on this rank."""
        inner = Shard(index, count)
        return Shard(self.index * inner.count + inner.index, self.count * inner.count)

    def owns(self, index: int, span: int) -> bool:
        """Whether sample `index` lies in one of this shard's spans."""
        return index // span % self.count == self.index

    def spans(self, start: int, span: int) -> Iterator[range]:
        """This shard's spans of indices in increasing order, beginning with the one that holds or follows `start`.

        Each is whole and aligned, also the first, which may therefore begin before `start`.
        """
        number = start // span
        number += (self.index - number) % self.count
        while True:
            yield range(number * span, (number + 1) * span)
            number += self.count

    def share(self, total: int) -> int:
        """This shard's part of `total` things dealt out as evenly as possible."""
        return total // self.count + (self.index < total % self.count)


def detect() -> Shard:
    """The rank's shard: torch.distributed if initialised, else the RANK and WORLD_SIZE that launchers set, else 0/1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def detect_worker() -> Shard | None:
    """The DataLoader worker that runs this code, None in the main process."""
    info = get_worker_info()
    return None if info is None else Shard(info.id, info.num_workers)
