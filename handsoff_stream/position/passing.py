"""Passes over a stream: which one comes next, and an iterator that owns the position of one.

Knows a walk and what comes out of it, saved states, epochs and processes. Does not know how samples are made.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.errors import StreamError
from handsoff_stream.position.dealing import Part
from handsoff_stream.position.epochs import MAX_EPOCH, Epochs
from handsoff_stream.position.state import STATE_VERSION, State, is_complete, pending_entry
from handsoff_stream.position.walk import Walk
from handsoff_stream.shard import Worker

T = TypeVar("T")


class Passes:
    """What the next pass is: its epoch, and the loaded state that it continues from, if any.

    Copies (pickles, deep copies, forked processes) begin where this one was set to begin, by `load` or `set_epoch`.
    """

    def __init__(self) -> None:
        self._epochs = Epochs()
        self._loaded: State | None = None
        self._loaded_pid: int | None = None
        self._waiting = False

    def begin(self, worker: Worker | None) -> tuple[int, State | None]:
        """A pass begins: its epoch, and the state to continue from."""
        state = self.waiting(worker)
        inside = self._loaded_pid == os.getpid()
        if worker is None or inside:
            self._waiting, self._loaded_pid = False, os.getpid()
        if state is not None and worker is not None and inside:
            return state["epoch"], state  # `load` has told the other workers
        return self._epochs.begin(worker), state

    def waiting(self, worker: Worker | None) -> State | None:
        """The loaded state, if the next pass continues from it."""
        here = self._loaded_pid == os.getpid()
        if worker is not None and not here:  # it was loaded in the main process
            return self._loaded if self._loaded is not None and self._epochs.is_first_pass_of(worker) else None
        return self._loaded if self._waiting or not here else None

    def begins_anew(self, worker: Worker | None) -> bool:
        """Whether the next pass is the first one of all, because nobody has said where to go on."""
        return self.waiting(worker) is None and self._epochs.is_untouched(worker)

    def load(self, state: State, worker: Worker | None) -> None:
        """Continue from a state, or after its epoch if nothing of that is left. A worker cannot know that of others."""
        done = worker is None and is_complete(state)
        self._loaded, self._loaded_pid, self._waiting = (None if done else state), os.getpid(), True
        if worker is None:
            self._epochs.set(state["epoch"] + done)
        else:
            self._epochs.note(worker, state["epoch"])

    def set_epoch(self, epoch: int) -> bool:
        """Whether this changes what comes next; see `HandsOffStream.set_epoch`.

        Raises:
            ValueError: an epoch that has no indices.
        """
        if not 0 <= epoch <= MAX_EPOCH:
            raise ValueError(f"epoch={epoch} has no indices; pass one in [0, {MAX_EPOCH}]")
        if self._epochs.is_current(epoch):
            return False
        state = self.waiting(None)
        if state is not None:
            warnings.warn(
                f"set_epoch({epoch}) gives up the loaded position in epoch {state['epoch']}; count epochs from there "
                "to resume",
                stacklevel=3,
            )
        self._loaded = None
        self._epochs.set(epoch)
        return True

    @property
    def epoch(self) -> int:
        """Of the latest pass of the main process, or of the first one."""
        return self._epochs.current

    def check_known(self) -> None:
        """Raises StreamError if the latest pass was made by workers of this process."""
        if self._epochs.workers_were_last:
            raise StreamError(
                "the latest pass was made by DataLoader workers, and their positions are not known here; use "
                "handsoff_stream.outlets.loader.HandsOffLoader or torchdata's StatefulDataLoader and save the state "
                "of the loader, or pass num_workers=0"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded_pid": None}


class Progress:
    """Where a pass is: what has been handed out, and so where to go on from.

    Args:
        walk: its counts and positions are those of what was handed out.
        epoch, part: of the pass.
        identity: options of the stream, which a state must share.
        pending: what goes with samples that were handed out and was not handed out itself, see state.py; kept up to
            date by who hands it out.
    """

    def __init__(self, walk: Walk, epoch: int, part: Part, identity: dict[str, Any], pending: dict[int, int]):
        self.walk, self.epoch, self._part, self._identity = walk, epoch, part, identity
        self.pending = pending
        self._counted_before = walk.counts["accepted"]

    def state_dict(self) -> State:
        """See state.py; JSON-able."""
        return {
            "version": STATE_VERSION,
            "stream": self._identity,
            "shard": [self.walk.shard.index, self.walk.shard.count],
            "epoch": self.epoch,
            "before": self._part.before,
            "handed": self._part.carried + self.walk.counts["accepted"] - self._counted_before,
            "walk": self.walk.state_dict(),
            **pending_entry(self.pending),
        }


class StreamIterator(Iterator[T], Generic[T]):
    """Hands out samples or batches, and counts what was handed out: not what was synthesized, decided or lost."""

    def __init__(self, items: Iterator[T], progress: Progress):
        self._items, self._progress = items, progress

    def __next__(self) -> T:
        try:
            item = next(self._items)
        except StopIteration:
            self._check_size()
            raise
        self._progress.walk.commit()
        if isinstance(item, LabelledBatch):
            return replace(item, next_index=self._progress.walk.cursor)
        return item

    def state_dict(self) -> State:
        """Position after the last item that this iterator handed out; see `HandsOffStream.state_dict`."""
        return self._progress.state_dict()

    def _check_size(self) -> None:
        walk = self._progress.walk
        if walk.left:
            raise StreamError(
                f"the indices {walk.indices.start} to {walk.indices.stop - 1} are used up and {walk.left} samples of "
                "epoch_size are missing, so this rank would end before others; pass a smaller epoch_size, or more "
                "indices"
            )
