"""Which lanes of the index line are mine: plain arithmetic on a rank x worker number.

The index line is cut into spans of a fixed number of indices, and span s lies on lane s % lanes. A filter names the
number of lanes (see `filters.py`), so it is the same for every number of ranks and workers; a shard owns whole lanes.
Knows integers. Does not know samples or filters. `detect()` and `detect_worker()` are the only code that asks
torch.distributed and DataLoader workers who is running.
"""

import os
from dataclasses import dataclass

import torch.distributed
from torch.utils.data import get_worker_info


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`.

    Raises:
        ValueError: `index` is not in [0, count).
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count} does not exist; pass 0 <= index < count")

    def split(self, index: int, count: int) -> "Shard":
        """Divide this shard further: worker `index` of `count` on this rank.

        The parts own exactly the lanes of this shard, so a rank may change its number of workers by itself.
        """
        inner = Shard(index, count)
        return Shard(self.index + self.count * inner.index, self.count * inner.count)

    def lanes(self, total: int) -> range:
        """The lanes of this shard, out of `total`."""
        return range(self.index, total, self.count)

    def contains(self, other: "Shard") -> bool:
        """Whether every lane of `other` is one of this shard's, for any number of lanes."""
        return other.count % self.count == 0 and other.index % self.count == self.index


@dataclass(frozen=True)
class Worker:
    """A DataLoader worker process."""

    turn: int
    """Its place in the order in which the loader takes from its workers."""
    count: int
    loader_pass: int
    """A number that all workers of one pass over the loader share, and that differs between passes, except that
    persistent workers keep theirs."""
    shift: int = 0
    """Whose turn it is first, after a resume in the middle of a round."""

    @property
    def index(self) -> int:
        """Which part of the rank's lanes it walks."""
        return (self.turn + self.shift) % self.count


def detect() -> Shard:
    """The rank's shard: torch.distributed if initialized, else the RANK and WORLD_SIZE that launchers set, else 0/1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def detect_worker() -> Worker | None:
    """The DataLoader worker that runs this code, None in the main process."""
    info = get_worker_info()
    return None if info is None else Worker(info.id, info.num_workers, info.seed - info.id)
