"""Which epoch the next pass over a stream is: a count that goes on by itself, also inside DataLoader workers.

Passes of the main process are counted by the process. Passes of workers are counted in shared memory, because a plain
DataLoader starts new processes for every pass, or keeps the old ones and tells them nothing, and never asks the
dataset of the main process. Copies (pickles, deep copies, forked processes other than workers) begin where the stream
was set to begin: a pass changes no copy. Knows processes and numbers. Does not know indices or samples.
"""

import os
import weakref
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch

from handsoff_stream.errors import StreamError
from handsoff_stream.shard import Worker, detect_worker

MAX_EPOCH = 2**23 - 1  # 2**63 indices are 2**23 epochs of 2**40
MAX_WORKERS = 512
_TAG_BITS = 40
_NONE = -1
_LATEST, _START = MAX_WORKERS, MAX_WORKERS + 1


class Epochs:
    """The epoch of the last pass and of the next one.

    Each worker has a word in shared memory: epoch and a tag of the pass that it began last, written at once. Workers
    of one pass agree without a lock, whichever begins first: one that finds its own pass takes that epoch, one that
    finds other passes only takes the epoch after the latest of them. The memory belongs to the process that starts the
    workers; a process that was itself started with a copy (a rank, say) takes new memory before it starts any.
    """

    def __init__(self, start: int = 0):
        self._start = start
        self._main_last: int | None = None
        self._main_next = start
        self._owner = os.getpid()
        self._shared = _memory(start)
        _LIVE.add(self)

    # Passes ------------------------------------------------------------------------------------------------------

    def begin(self, worker: Worker | None) -> int:
        """A pass begins in this process: its epoch.

        Raises:
            StreamError: no epoch is left, or there are more workers than words.
        """
        epoch = self._begin_in_main() if worker is None else self._begin_in_worker(worker)
        if epoch > MAX_EPOCH:
            raise StreamError(f"epoch {epoch} has no indices, {MAX_EPOCH} is the last one; use another seed")
        return epoch

    def _begin_in_main(self) -> int:
        self.own()
        epoch = self._main_next
        self._main_last, self._main_next = epoch, epoch + 1
        self._shared[_LATEST] = _NONE
        return epoch

    def _begin_in_worker(self, worker: Worker) -> int:
        if worker.count > MAX_WORKERS:
            raise StreamError(f"{worker.count} DataLoader workers, at most {MAX_WORKERS} can be told apart")
        words = self._shared[: worker.count].tolist()
        mine, tag = words[worker.turn], worker.loader_pass % 2**_TAG_BITS
        same = [word % 2**23 for word in words if word != _NONE and word >> 23 == tag]
        others = [word % 2**23 for word in words if word != _NONE and word >> 23 != tag]
        if mine != _NONE and mine >> 23 == tag:  # a persistent worker goes through its passes with one tag
            epoch = mine % 2**23 + 1
        elif same:
            epoch = max(same)
        else:
            epoch = max(others) + 1 if others else int(self._shared[_START])
        self.note(worker, epoch)
        return epoch

    def note(self, worker: Worker, epoch: int) -> None:
        """This worker is in `epoch`."""
        self._shared[worker.turn] = (worker.loader_pass % 2**_TAG_BITS) << 23 | epoch
        self._shared[_LATEST] = 1

    def is_first_pass_of(self, worker: Worker) -> bool:
        """Whether no other pass of workers has begun since the stream was set to an epoch."""
        tag = worker.loader_pass % 2**_TAG_BITS
        words = self._shared[: worker.count].tolist()
        return words[worker.turn] == _NONE and all(word == _NONE or word >> 23 == tag for word in words)

    def is_untouched(self, worker: Worker | None) -> bool:
        """Whether the next pass is the first one, and nobody has said which epoch it is."""
        if worker is not None:
            return self._start == 0 and self.is_first_pass_of(worker)
        return self._start == 0 and self._main_last is None and not self.workers_were_last

    # The main process --------------------------------------------------------------------------------------------

    def is_current(self, epoch: int) -> bool:
        """Whether `epoch` is that of the last pass or of the next one, in the main process and in workers."""
        self.own()
        main = epoch in (self._main_last, self._main_next)
        words = [word % 2**23 for word in self._shared[:MAX_WORKERS].tolist() if word != _NONE]
        if not words:
            return main if self._main_last is not None else epoch == self._start
        return epoch in (max(words), max(words) + 1) and (self._main_last is None or main)

    def set(self, epoch: int) -> None:
        """Let the next pass be `epoch`, in this process and in its workers, those that wait for it included."""
        self.own()
        self._start = self._main_next = epoch
        self._main_last = None
        self._shared.copy_(_memory(epoch))

    @property
    def current(self) -> int:
        """The epoch of the last pass of the main process, or of the first one."""
        self.own()
        return self._start if self._main_last is None else self._main_last

    @property
    def workers_were_last(self) -> bool:
        """Whether the latest pass was one of DataLoader workers."""
        self.own()
        return bool(self._shared[_LATEST] == 1)

    def own(self) -> None:
        """Begin anew in a process that came by this object as a copy, unless it is a DataLoader worker."""
        if self._owner != os.getpid() and detect_worker() is None:
            self._owner, self._shared = os.getpid(), _memory(self._start)
            self._main_last, self._main_next = None, self._start

    def __getstate__(self) -> dict[str, Any]:
        # A process that is being started may be a worker, and shares the memory; every other copy has its own.
        self.own()
        shared = self._shared if get_spawning_popen() is not None else None
        return {"_start": self._start, "_main_last": None, "_main_next": self._start, "_shared": shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owner = os.getpid() if self._shared is None else _NONE
        if self._shared is None:
            self._shared = _memory(self._start)
        _LIVE.add(self)


def _memory(start: int) -> torch.Tensor:
    """A word for each worker, none begun; then whether the latest pass was one of workers, and the first epoch."""
    words = torch.full((MAX_WORKERS + 2,), _NONE, dtype=torch.int64, device="cpu")
    words[_START] = start
    return words.share_memory_()


_LIVE: "weakref.WeakSet[Epochs]" = weakref.WeakSet()


def _own_all() -> None:
    for epochs in list(_LIVE):
        epochs.own()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_own_all)
