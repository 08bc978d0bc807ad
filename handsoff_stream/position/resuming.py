"""What of a stream can be saved and continued: epochs, counts, and positions of what was handed out.

Knows passes and saved states. Does not know how samples are made, nor from what.
"""

import os
from abc import abstractmethod
from typing import Any

from handsoff_stream.position.dealing import Dealing
from handsoff_stream.position.passing import Passes, Progress
from handsoff_stream.position.state import State, beginning, check_same_stream, check_version
from handsoff_stream.shard import Shard, Worker, detect_worker


class Resumable:
    """The part of `HandsOffStream` that knows where it is."""

    def __init__(self) -> None:
        self._passes = Passes()
        self._progress: tuple[int, Progress] | None = None
        """The latest pass, and the process that made it."""

    @property
    @abstractmethod
    def _dealing(self) -> Dealing: ...

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Options that a state must share."""

    @abstractmethod
    def _rank(self, worker: Worker | None) -> Shard:
        """This process's rank, or that of the process that started this worker."""

    @abstractmethod
    def _new_progress(self, state: State | None, epoch: int, worker: Worker | None) -> Progress:
        """The beginning of a pass."""

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this epoch, in this process and in DataLoader workers, persistent ones included.

        Passes go on by themselves, so the epoch that is current or next changes nothing, nor a loaded state of it.

        Raises:
            ValueError: no such epoch.
        """
        if self._passes.set_epoch(epoch):
            self._progress = None

    @property
    def accepted(self) -> int:
        """Samples handed out by the latest pass of this process."""
        return self._count("accepted")

    @property
    def rejected(self) -> int:
        """Samples dropped by the filter in the latest pass of this process."""
        return self._count("rejected")

    @property
    def skipped(self) -> int:
        """Samples dropped in the latest pass of this process because they were not finite; among the rejected."""
        return self._count("skipped")

    def _count(self, name: str) -> int:
        return 0 if self._progress is None else self._progress[1].walk.counts[name]

    def state_dict(self) -> State:
        """Position after the last sample or batch that the latest iterator of this process handed out; JSON-able.

        Load it into a stream built with the same options. Batch size, transforms and output device may differ; the
        number of ranks may if the states of all ranks go through `merge_states`, the number of workers if they come
        from a `HandsOffLoader`.

        Raises:
            StreamError: the latest pass was made by DataLoader workers, which this process knows nothing of.
        """
        worker = detect_worker()
        if worker is None:
            self._passes.check_known()
        waiting = self._passes.waiting(worker)
        if waiting is not None and waiting["walk"] is not None:
            return self._new_progress(waiting, waiting["epoch"], worker).state_dict()
        if self._progress is not None and self._progress[0] == os.getpid():
            return self._progress[1].state_dict()
        rank = self._rank(worker)
        before = 0 if waiting is None else waiting["before"] + waiting["handed"]
        shard = rank if worker is None else rank.split(worker.index, worker.count)
        return beginning(self._identity(), shard, self._passes.epoch, before)

    def state_of(self, worker: Worker, epoch: int, loaded: State | None) -> State:
        """The state in which a worker begins an epoch, or goes on from a state of its rank or of all of them."""
        return self._new_progress(loaded, epoch, worker).state_dict()

    def load_state_dict(self, state: State) -> None:
        """Let the next pass continue exactly where `state_dict()` was taken, or begin the epoch after one that is done.

        DataLoader workers that are started later continue there, too.

        Args:
            state: of this shard, of a single one, or of all shards by `merge_states`.

        Raises:
            ValueError: the state is of another version, of a stream with other options, or lacks the positions of
                other shards; it says which and what to do.
        """
        check_version(state)
        check_same_stream(state["stream"], self._identity())
        worker = detect_worker()
        self._dealing.part(state, self._rank(worker), worker)
        self._passes.load(state, worker)
        self._progress = None
