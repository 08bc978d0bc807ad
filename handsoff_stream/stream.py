"""HandsOffStream: walk my share of the index line, filter, hand out samples or batches, and know the position.

A sample is a pure function of (checkpoint, seed, index), so iteration is a walk over indices, a shard is a subset of
them, and the state of a stream is a position (and the filter's recent scores). Knows indices, scores and a callable
from indices to a batch. Does not know networks, tasks, files or CUDA.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from handsoff_stream.batch import LabelledBatch, Labels
from handsoff_stream.checkpoint import Checkpoint, CheckpointSource
from handsoff_stream.device import check_device, default_chunk_size, resolve_device
from handsoff_stream.errors import StreamError
from handsoff_stream.filters import Filter, RejectionMonitor, make_filter
from handsoff_stream.prefetch import prefetch
from handsoff_stream.seeding import MAX_INDEX, check_seed
from handsoff_stream.shard import Shard, detect, detect_worker
from handsoff_stream.synthesizer import SynthesisOptions, Synthesizer
from handsoff_stream.transforms import JointTransform

STATE_VERSION = 1
EPOCH_STRIDE = 2**40  # indices between the starts of two epochs: far more than one epoch can walk

Synthesize = Callable[[Sequence[int]], LabelledBatch]
Sample = tuple[Tensor, Labels]


class HandsOffStream(IterableDataset[Any]):
    """An endless dataset of labelled images, synthesised while you train.

    With `batch_size=None` it yields samples `(image, label)` for `DataLoader(stream, batch_size=8)`; with
    `batch_size=n` it yields `LabelledBatch`es for `DataLoader(stream, batch_size=None)`, which collates nothing.
    image: float32 [3, H, W] in [0, 1] on 8-bit levels. label: int64 [H, W] (segmentation), float32 [K, H, W]
    (keypoint heatmaps) or float32 [1, H, W] (depth); a checkpoint with several heads gives a dict of labels by head.

    `stream[i]` regenerates sample i, rejected or not. `state_dict()` is small, JSON-able, and counts what was handed
    out, not what was prefetched. Ranks and DataLoader workers share the indices without overlap; samples have the
    same bits for any batch size, rank or worker count on the same kind of device. On a CPU that needs the same number
    of intra-op threads as well: oneDNN may add in another order for another number, which moves a pixel here and there
    by one 8-bit level. DataLoader workers have one thread; one and two have been seen to agree.

    Args:
        checkpoint: name of a checkpoint that ships ("faces"), path of a `.safetensors`, or a loaded `Checkpoint`.
        batch_size: None for samples, n for batches.
        seed: which stream; in [0, 2**64).
        filter: "rolling" (default), "block", "threshold", None, or a `Filter`.
        truncation: psi on all layers around the mean latent; None means the checkpoint's own.
        num_samples: accepted samples an epoch over all shards; None means endless.
        device: where to synthesise and where samples lie; None means CUDA if there is one. CUDA synthesises in the
            main process (`num_workers=0`).
        transforms: joint transform of image and label (torchvision v2), its randomness a function of (seed, index).
        noise: "const" (stored maps), "none", or "random" (fresh maps per index).
        score: image score, "top10_mean" (published code) or "sum" (HandsOff, section 3.3).
        chunk_size: indices synthesised at once; None means 16 on CUDA, 4 on a CPU.
        shard: this process's part; None asks torch.distributed or the launcher's environment.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or has no labelling head.
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        filter: str | Filter | None = "rolling",
        truncation: float | None = None,
        num_samples: int | None = None,
        device: str | torch.device | None = None,
        transforms: Callable[..., Any] | None = None,
        noise: str = "const",
        score: str = "top10_mean",
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ):
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("num_samples", num_samples),
            ("chunk_size", chunk_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} yields nothing; pass a positive integer or None")
        self._source = CheckpointSource(checkpoint)
        self.device = resolve_device(device)
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.chunk_size = chunk_size or default_chunk_size(self.device)
        self.options = SynthesisOptions(
            seed=check_seed(seed),
            truncation=self._source.truncation if truncation is None else truncation,
            noise=noise,
            score=score,
        )
        self._filter = make_filter(filter)
        self._transform = None if transforms is None else JointTransform(transforms, seed)
        self._shard = shard
        self._epoch = 0
        self._walk: _Walk | None = None
        self._resume: dict[str, Any] | None = None
        self._synthesizer: Synthesizer | None = None

    # Iteration -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Sample | LabelledBatch]:
        shard = self._my_shard()
        check_device(self.device, in_worker=detect_worker() is not None)
        quota = None if self.num_samples is None else shard.share(self.num_samples)
        filter = copy.deepcopy(self._filter)  # each iteration has a history of its own
        filter.start(self._source.calibration_scores(self.options))
        walk = _Walk(filter, shard, self.chunk_size, quota, start=self._epoch * EPOCH_STRIDE)
        if self._resume is not None:
            _check_shard(self._resume["stream"]["shard"], shard)
            walk.load_state_dict(self._resume["walk"])
            self._resume = None
        self._walk = walk
        rows = walk.rows(lambda chunks: prefetch(self._synthesize(), chunks, self.device))
        if self.batch_size is None:
            return (self._sample(batch, row) for batch, row in rows)
        return self._batches(rows, self.batch_size, walk)

    def _batches(self, rows: Iterator[tuple[LabelledBatch, int]], size: int, walk: "_Walk") -> Iterator[LabelledBatch]:
        held: list[LabelledBatch] = []
        for batch, row in rows:
            held.append(self._transformed(batch.select([row])))
            if len(held) == size:
                yield LabelledBatch.concatenate(held, next_index=walk.cursor)
                held = []
        if held:
            yield LabelledBatch.concatenate(held, next_index=walk.cursor)

    def _sample(self, batch: LabelledBatch, row: int) -> Sample:
        image, label = self._transformed(batch.select([row]))
        return image[0], {k: v[0] for k, v in label.items()} if isinstance(label, dict) else label[0]

    def _transformed(self, one: LabelledBatch) -> LabelledBatch:
        return one if self._transform is None else self._transform(one)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of this seed, whether the filter keeps it or not; any int in [0, 2**63 - chunk_size)."""
        if not 0 <= index < MAX_INDEX - self.chunk_size:
            raise IndexError(f"index {index} addresses no sample; pass one in [0, 2**63 - {self.chunk_size})")
        check_device(self.device, in_worker=detect_worker() is not None)
        first = index // self.chunk_size * self.chunk_size
        chunk = range(first, first + self.chunk_size)
        (batch,) = prefetch(self._synthesize(), iter([chunk]), self.device)
        return self._sample(batch, index - first)

    def __len__(self) -> int:
        """Samples (or batches) that this rank yields an epoch.

        Raises:
            TypeError: the stream is endless (`num_samples=None`).
        """
        if self.num_samples is None:
            raise TypeError("an endless stream has no length; pass num_samples=... to give an epoch one")
        share = self._rank_shard().share(self.num_samples)
        return share if self.batch_size is None else math.ceil(share / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter()` begin at index `epoch * 2**40`: samples that no other epoch has."""
        if not 0 <= epoch < MAX_INDEX // EPOCH_STRIDE:
            raise ValueError(f"epoch={epoch} has no indices; pass one in [0, {MAX_INDEX // EPOCH_STRIDE})")
        self._epoch, self._walk, self._resume = epoch, None, None

    # State -----------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Samples handed out by the current iteration of this process."""
        return 0 if self._walk is None else self._walk.monitor.accepted

    @property
    def rejected(self) -> int:
        """Samples dropped by the filter in the current iteration of this process."""
        return 0 if self._walk is None else self._walk.monitor.rejected

    def state_dict(self) -> dict[str, Any]:
        """Position after the last sample or batch handed out; JSON-able.

        Load it into a stream built with the same options, before iterating. Batch size and transforms may differ.
        """
        if self._resume is not None:
            return self._resume
        walk = None if self._walk is None else self._walk.state_dict()
        return {"version": STATE_VERSION, "stream": self._identity(), "epoch": self._epoch, "walk": walk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `iter()` continue exactly where `state_dict()` was taken.

        Raises:
            ValueError: the state is of another version, or of a stream with other options or another shard; it says
                which option differs and what to do.
        """
        version = state.get("version") if isinstance(state, dict) else None
        if version != STATE_VERSION or not state.keys() >= {"stream", "epoch", "walk"}:
            raise ValueError(
                f"this is no stream state of version {STATE_VERSION} (version={version!r}), so the position is "
                "unknown; load it with the release that wrote it, or start a new stream with another seed"
            )
        mine = self._identity()
        for name in sorted(mine.keys() | state["stream"].keys()):
            theirs = state["stream"].get(name)
            if theirs != mine.get(name):
                raise ValueError(
                    f"the state was saved with {name}={theirs!r}, this stream has {name}={mine.get(name)!r}: resuming "
                    "would repeat or skip samples without a word. Build the stream as it was, or start a new one "
                    "with another seed"
                )
        self._epoch = state["epoch"]
        self._walk = None
        self._resume = state if state["walk"] is not None else None

    def _identity(self) -> dict[str, Any]:
        shard = self._my_shard()
        return {
            "checkpoint": self._source.fingerprint,
            "chunk_size": self.chunk_size,
            "filter": self._filter.config(),
            "num_samples": self.num_samples,
            "shard": [shard.index, shard.count],
            **self.options.config(),
        }

    # Construction on first use ---------------------------------------------------------------------------------

    def _rank_shard(self) -> Shard:
        return self._shard or detect()

    def _my_shard(self) -> Shard:
        rank, worker = self._rank_shard(), detect_worker()
        return rank if worker is None else rank.split(worker.index, worker.count)

    def _synthesize(self) -> Synthesize:
        if self._synthesizer is None:
            self._synthesizer = Synthesizer(self._source.load(), self.options, self.device)
        return self._synthesizer

    def __getstate__(self) -> dict[str, Any]:
        # A copy for another process starts where this stream would; it builds its own networks on first use.
        state = self.__dict__.copy()
        state["_resume"] = self.state_dict() if self._walk is not None else self._resume
        state["_walk"] = state["_synthesizer"] = None
        return state


class _Walk:
    """One iteration: index by index through the shard's spans, score by score through the filter.

    Invariant: `cursor` is the smallest index of the shard whose sample has been neither handed out nor dropped.
    """

    def __init__(self, filter: Filter, shard: Shard, chunk_size: int, quota: int | None, *, start: int):
        self.filter = filter
        self.shard = shard
        self.chunk_size = chunk_size
        self.quota = quota
        self.cursor = start
        self.monitor = RejectionMonitor(filter)

    def chunks(self, first: int) -> Iterator[range]:
        """The shard's chunks from the one that holds `first` on: whole, aligned, increasing."""
        span = math.lcm(self.chunk_size, self.filter.span)
        for indices in self.shard.spans(first, span):
            for begin in range(indices.start, indices.stop, self.chunk_size):
                if begin + self.chunk_size > first:
                    yield range(begin, begin + self.chunk_size)

    def rows(
        self, produce: Callable[[Iterator[range]], Iterator[LabelledBatch]]
    ) -> Iterator[tuple[LabelledBatch, int]]:
        """(chunk, row) of every sample that is kept, until the quota is filled."""
        # A block filter decides blocks as a whole: its first scores are pushed again, its decisions not repeated.
        first = self.cursor // self.filter.span * self.filter.span
        undecided: deque[tuple[int, LabelledBatch, int]] = deque()
        if self.monitor.accepted == self.quota:
            return
        for batch in produce(self.chunks(first)):
            scores = zip(batch.indices.tolist(), batch.uncertainty.tolist(), strict=True)
            for row, (index, score) in enumerate(scores):
                if index < first:
                    continue
                _check_finite(score, index)
                undecided.append((index, batch, row))
                for keep in self.filter.push(score):
                    decided, its_batch, its_row = undecided.popleft()
                    if decided < self.cursor:
                        continue
                    self.cursor = decided + 1
                    self.monitor.count(keep)
                    if keep:
                        yield its_batch, its_row
                    if self.monitor.accepted == self.quota:
                        return

    def state_dict(self) -> dict[str, Any]:
        return {
            "cursor": self.cursor,
            "filter": self.filter.state_dict(),
            "counts": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]
        self.filter.load_state_dict(state["filter"])
        self.monitor.load_state_dict(state["counts"])


def _check_finite(score: float, index: int) -> None:
    if not math.isfinite(score):
        raise StreamError(
            f"sample {index} has the uncertainty {score}: the generator or a label generator computes NaN or infinite "
            "values there, and its label would be garbage; check the checkpoint with `handsoff-stream inspect`"
        )


def _check_shard(saved: list[int], shard: Shard) -> None:
    if saved != [shard.index, shard.count]:
        raise ValueError(
            f"the state belongs to shard {saved[0]} of {saved[1]}, this process is shard {shard.index} of "
            f"{shard.count}: a state loaded in the main process cannot position DataLoader workers. Use "
            "torchdata's StatefulDataLoader, which saves one state a worker, or num_workers=0"
        )
