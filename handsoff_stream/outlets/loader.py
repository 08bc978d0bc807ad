"""A loader that knows where it is, with any number of workers: for loops that save and resume.

    loader = HandsOffLoader(HandsOffStream("faces", batch_size=8, epoch_size=10_000), num_workers=4)

Every batch comes back from its worker with the worker's position after it, so the state is that of what was yielded,
however far the workers are ahead. It is the state of the rank: another number of workers goes on from it, and
`merge_states` makes one of all ranks. With the same number of workers the batches come in the same order. Knows
loaders, batches and states. Does not know how samples are made.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.position.state import State, is_complete, merge_workers
from handsoff_stream.shard import Worker, detect_worker
from handsoff_stream.stream import HandsOffStream

T = TypeVar("T")
REMEMBERED = 8  # yielded batches whose state can still be asked for


class HandsOffLoader(Generic[T]):
    """Iterates over what a stream yields; has a length if the stream's epochs have a size.

    Every pass is an epoch, and they go on by themselves. Not a `DataLoader`, so frameworks that would shard one again
    (Accelerate's `prepare`) leave it alone: every rank makes its own samples.

    Args:
        stream: of samples or batches.
        num_workers: processes that synthesize, for streams on a CPU.
        prefetch_factor: as of a `DataLoader`.
        persistent_workers: as of a `DataLoader`.
        multiprocessing_context: as of a `DataLoader`.
        pin_memory: of what does not lie on a device already.
    """

    def __init__(
        self,
        stream: HandsOffStream[T],
        *,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        multiprocessing_context: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.num_workers = num_workers
        self._options: dict[str, Any] = {
            "num_workers": num_workers,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "multiprocessing_context": multiprocessing_context,
            "pin_memory": pin_memory and stream.output_device.type == "cpu",
        }
        self._loader: DataLoader[Any] | None = None
        self._resume: State | None = None
        self._latest: State | None = None
        self._yielded: deque[tuple[list[int], State]] = deque(maxlen=REMEMBERED)

    def __iter__(self) -> Iterator[T]:
        if self._loader is None:
            self._loader = DataLoader(_WithStates(self.stream), batch_size=None, collate_fn=_same, **self._options)
        resume, self._resume = self._resume, None
        states: dict[int, State] = {}
        self._yielded.clear()
        for turn, item, state in self._loader:
            states = states or self._beginnings(state["epoch"], resume)
            states[turn] = state
            self._latest = merge_workers(states, after=turn)
            if isinstance(item, LabelledBatch):
                self._yielded.append((item.indices.tolist(), self._latest))
            yield item

    def _beginnings(self, epoch: int, resume: State | None) -> dict[int, State]:
        """States of the workers that have not yielded anything yet, by their turn."""
        workers = [Worker(turn, self.num_workers, 0) for turn in range(self.num_workers)]
        return {worker.turn: self.stream.state_of(worker, epoch, resume) for worker in workers}

    def __len__(self) -> int:
        """What this rank yields per epoch; raises TypeError if the stream is endless."""
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """See `HandsOffStream.set_epoch`."""
        self.stream.set_epoch(epoch)

    def state_dict(self, *, after: LabelledBatch | None = None) -> State:
        """Position of this rank after what was yielded last, or after a batch that was yielded not long before it.

        Args:
            after: for loops that fetch ahead of the batch they train on; one of the last 8.

        Raises:
            ValueError: a batch that was not yielded by this pass, or too long ago.
        """
        if after is None:
            return self.stream.state_dict() if self._latest is None else self._latest
        for indices, state in self._yielded:
            if indices == after.indices.tolist():
                return state
        raise ValueError(
            f"the state after the batch that begins with index {int(after.indices[0])} is not known; pass one of the "
            f"last {REMEMBERED} batches of this pass"
        )

    def load_state_dict(self, state: State) -> None:
        """Let the next pass continue after the state of a loader or stream; see `HandsOffStream.load_state_dict`."""
        self.stream.load_state_dict(state)
        self._loader = None  # workers that wait for the next pass know nothing of it
        self._resume = None if is_complete(state) else state
        self._latest = None

    def __repr__(self) -> str:
        return f"HandsOffLoader({self.stream!r}, num_workers={self.num_workers})"


class _WithStates(IterableDataset[Any]):
    """(turn of this worker, item, state after it)."""

    def __init__(self, stream: HandsOffStream[Any]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[int, Any, State]]:
        worker = detect_worker()
        turn = 0 if worker is None else worker.turn
        items = iter(self.stream)
        for item in items:
            yield turn, item, items.state_dict()


def _same(item: T) -> T:
    return item
