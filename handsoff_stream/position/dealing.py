"""How many samples each rank and worker hands out in an epoch, and which indices an epoch has: plain arithmetic.

Every rank hands out the same number of samples in batches of the same sizes, so that no collective operation waits
for a rank that has ended; the workers of a rank share its batches, so their number changes neither. Knows integers,
shards and saved states. Does not know samples or filters.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from handsoff_stream.errors import StreamError
from handsoff_stream.position.state import State
from handsoff_stream.seeding import MAX_INDEX
from handsoff_stream.shard import Shard, Worker

EPOCH_STRIDE = 2**40  # indices between the starts of two epochs: far more than one epoch can walk


@dataclass(frozen=True)
class Line:
    """The indices of an epoch: from `first` on, at every pass other ones; or up to `stop`, at every pass the same."""

    first: int = 0
    stop: int | None = None

    @classmethod
    def of(cls, indices: range | None) -> "Line":
        """Raises ValueError if the range has a step, or is empty, or holds indices without a sample."""
        if indices is None:
            return cls()
        if indices.step != 1 or not 0 <= indices.start < indices.stop <= MAX_INDEX:
            raise ValueError(
                f"indices={indices} are no part of the index line; pass a range that is not empty, of step 1 and "
                "within 0 .. 2**63"
            )
        return cls(indices.start, indices.stop)

    def indices(self, epoch: int) -> range:
        """The indices of one pass."""
        if self.stop is not None:
            return range(self.first, self.stop)
        return range(epoch * EPOCH_STRIDE + self.first, (epoch + 1) * EPOCH_STRIDE)

    def take(self, count: int) -> "Line":
        """The first `count` indices."""
        _check_count(count, at_least=1)
        end = self.first + count
        return Line(self.first, end if self.stop is None else min(end, self.stop))

    def skip(self, count: int) -> "Line":
        """All but the first `count` indices.

        Raises:
            ValueError: a negative count, or one that leaves no index.
        """
        _check_count(count, at_least=0)
        if self.first + count >= (EPOCH_STRIDE if self.stop is None else self.stop):
            raise ValueError(f"skip({count}) leaves none of the indices; skip fewer")
        return replace(self, first=self.first + count)


@dataclass(frozen=True)
class Part:
    """What one shard has to do in an epoch, and what has been done."""

    left: int | None
    """Samples to hand out; None if the epoch has no size."""
    before: int = 0
    """Samples that all shards handed out before they were dealt out as they are."""
    carried: int = 0
    """Samples that this shard has handed out since, but that its walk does not count."""
    same_shard: bool = False
    """Whether the saved state is of this very shard."""


@dataclass(frozen=True)
class Dealing:
    """The rules of one stream."""

    epoch_size: int | None
    batch_size: int | None
    drop_last: bool
    ratio: Fraction = Fraction(0)
    """Labelled images that go with each sample; those of a batch are part of it."""

    def length(self, ranks: int) -> int:
        """What a rank yields per epoch: batches, or samples and the labelled images that go with them.

        Raises:
            TypeError: the epoch has no size, or the number of labelled images depends on what the filter keeps.
        """
        if self.epoch_size is None:
            raise TypeError("an endless stream has no length; pass epoch_size=... to give an epoch one")
        samples = self.per_rank(self.epoch_size, ranks)
        if self.batch_size is not None:
            return -(-samples // self.batch_size)
        if self.ratio.denominator != 1:
            raise TypeError(f"an epoch of this mixture has no length, since {self._uneven}")
        return samples * int(1 + self.ratio)

    @property
    def _uneven(self) -> str:
        return (
            f"each sample has {self.ratio} labelled images on average, and how many those of an epoch have depends on "
            "which ones the filter keeps; build the stream with batch_size, or pass a share of 1/2, 2/3, 3/4 or so on"
        )

    def per_rank(self, total: int, ranks: int) -> int:
        """Each rank's samples out of `total`: rounded up, so that none is left out; or down to whole batches."""
        if not self.drop_last:
            return -(-total // ranks)
        size = self.batch_size or 1
        return total // ranks // size * size

    def per_worker(self, samples: int, worker: Worker | None) -> int:
        """A worker's samples out of its rank's: every `count`-th batch, of which the very last may be short."""
        if worker is None:
            return samples
        size = self.batch_size or 1
        batches = -(-samples // size)
        mine = batches // worker.count + (worker.turn < batches % worker.count)
        has_last = batches > 0 and (batches - 1) % worker.count == worker.turn
        return mine * size - (batches * size - samples if has_last else 0)

    def part(self, state: State | None, rank: Shard, worker: Worker | None) -> Part:
        """The part of a rank, or of one of its workers, at the beginning of an epoch or after a saved state.

        Raises:
            ValueError: the state lacks lanes of this shard, or contains what this stream cannot hand out.
            StreamError: ranks would hand out different numbers of labelled images in an epoch.
        """
        if self.epoch_size is not None and self.batch_size is None and rank.count > 1 and self.ratio.denominator != 1:
            raise StreamError(
                f"some of the {rank.count} ranks would wait for others that have ended, since {self._uneven}"
            )
        if state is None:
            return Part(self._left(0, rank, worker))
        self._check_pending(state, rank)
        mine = rank if worker is None else rank.split(worker.index, worker.count)
        saved = None if state["shard"] is None else Shard(*state["shard"])
        if saved == mine and state["walk"] is not None:
            return Part(state["walk"]["left"], state["before"], state["handed"], same_shard=True)
        carried = state["handed"] if worker is None or worker.turn == 0 else 0
        lefts = state.get("lefts", []) if saved == rank and self.batch_size is None else []
        if worker is not None and len(lefts) == worker.count:
            return Part(lefts[worker.turn], state["before"], carried)
        if saved is None or saved.count == 1:
            before = state["before"] + state["handed"]
            return Part(self._left(before, rank, worker), before)
        if saved != rank:
            raise ValueError(
                f"the state belongs to shard {saved.index} of {saved.count}, this process is shard {mine.index} of "
                f"{mine.count}, so the positions of other shards are missing; load merge_states([the state of every "
                "shard])"
            )
        left = state["walk"]["left"] if state["walk"] else self._left(state["before"], rank, None)
        return Part(None if left is None else self.per_worker(left, worker), state["before"], carried)

    def _check_pending(self, state: State, rank: Shard) -> None:
        if not state.get("pending"):
            return
        if self.batch_size is not None:
            raise ValueError(
                "the state was saved between a sample and the labelled images that go with it, and a stream of batches "
                "would leave those out; load it into a mixture of samples (batch_size=None)"
            )
        dealt_anew = state["shard"] is None or Shard(*state["shard"]).count == 1
        if dealt_anew and rank.count > 1 and self.epoch_size is not None:
            raise ValueError(
                "the state was saved between a sample and the labelled images that go with it, which one rank would "
                f"hand out more than the others of {rank.count}, so that they would end their epoch without it; save "
                "after whole groups of a sample and its labelled images, or build the stream with batch_size"
            )

    def _left(self, before: int, rank: Shard, worker: Worker | None) -> int | None:
        if self.epoch_size is None:
            return None
        return self.per_worker(self.per_rank(max(self.epoch_size - before, 0), rank.count), worker)


def addressed(index: int | slice, chunk_size: int) -> list[int]:
    """The indices that an int or a slice names.

    Raises:
        IndexError: an index without a sample, or a slice without an end, or of nothing.
    """
    if not isinstance(index, slice):
        wanted = [index]
    elif index.stop is None or not (wanted := list(range(index.start or 0, index.stop, index.step or 1))):
        raise IndexError(f"{index} names no samples of an endless stream; pass a start below a stop")
    for one in wanted[:1] + wanted[-1:]:
        if not 0 <= one < MAX_INDEX - chunk_size:
            raise IndexError(f"index {one} addresses no sample; pass one in [0, 2**63 - {chunk_size})")
    return wanted


def _check_count(count: int, *, at_least: int) -> None:
    if count < at_least:
        raise ValueError(f"{count} indices cannot be taken or skipped; pass at least {at_least}")
