"""HandsOffStream: walk my share of the index line, filter, hand out samples or batches, and know the position.

A sample is a pure function of (checkpoint, seed, index), so iteration is a walk over indices, a shard is a subset of
them, and the state of a stream is a position (and the filter's recent scores). Knows indices, scores and a callable
from indices to a batch. Does not know networks, tasks, files or CUDA.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from handsoff_stream.batch import LabelledBatch, Labels, consecutive
from handsoff_stream.checkpoint import Checkpoint, CheckpointSource
from handsoff_stream.device import check_device, default_chunk_size, resolve_device
from handsoff_stream.filters import Filter, make_filter
from handsoff_stream.options import FilterKind, KernelKind, NoiseKind, SynthesisOptions
from handsoff_stream.precision import Precision, compute_dtype, default_precision
from handsoff_stream.prefetch import Chunk, Synthesize, prefetch
from handsoff_stream.seeding import MAX_INDEX, check_seed
from handsoff_stream.shard import Shard, detect, detect_worker
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.transforms import JointTransform
from handsoff_stream.uncertainty import ScoreKind
from handsoff_stream.walk import EPOCH_STRIDE, STATE_VERSION, Walk, check_version, options_that_differ

Sample = tuple[Tensor, Labels]
Row = tuple[Chunk, int]

MERGE_REMEDY = "; for another number of ranks or workers load merge_states([the state of every shard])"


class HandsOffStream(IterableDataset[Any]):
    """An endless dataset of labelled images, synthesised while you train.

    With `batch_size=None` it yields samples `(image, label)` for `DataLoader(stream, batch_size=8)`; with
    `batch_size=n` it yields `LabelledBatch`es for `DataLoader(stream, batch_size=None)`, which collates nothing.
    image: float32 [3, H, W] in [0, 1] on 8-bit levels. label: int64 [H, W] (segmentation), float32 [K, H, W]
    (keypoint heatmaps) or float32 [1, H, W] (depth); a checkpoint with several heads gives a dict of labels by head.

    `stream[i]` regenerates sample i, rejected or not. `state_dict()` is small, JSON-able, and counts what was handed
    out, not what was prefetched. Ranks and DataLoader workers share the indices without overlap; samples have the
    same bits for any batch size, rank or worker count on the same kind of device.

    On a CPU the bits also depend on the number of intra-op threads, because products may be summed in another order:
    with "faces" one and two threads agree, three and more move the last bits of some scores. DataLoader workers
    therefore keep the one thread that PyTorch gives them, whatever the number of cores: any number of workers agrees,
    none oversubscribes the machine, and `num_workers` = cores uses all of it. Without workers it is
    `torch.get_num_threads()`.

    Args:
        checkpoint: name of a checkpoint that ships ("faces"), path of a `.safetensors`, or a loaded `Checkpoint`.
        batch_size: None for samples, n for batches.
        seed: which stream; in [0, 2**64).
        filter: "rolling" (default), "block", "threshold", None, or a `Filter`.
        truncation: psi on all layers around the mean latent; None means the checkpoint's own.
        num_samples: accepted samples an epoch over all shards; None means endless.
        device: where to synthesise; None means CUDA if there is one. CUDA synthesises in the main process
            (`num_workers=0`), beside training, on a stream of its own.
        output_device: where samples lie, for instance "cuda:0" with device="cuda:1"; None means `device`.
        transforms: joint transform of image and label (torchvision v2), its randomness a function of (seed, index).
        noise: "const" (stored maps), "none", or "random" (fresh maps per index).
        score: image score, "top10_mean" (published code) or "sum" (HandsOff, section 3.3).
        precision: of images and labels, "exact" (float32) or "fast" (16-bit products: float16 on CUDA, bfloat16 on a
            CPU that has it); None means "fast" on CUDA, else "exact".
        kernel: of labels, "triton" (one fused CUDA kernel), "torch", or "auto".
        chunk_size: indices synthesised at once; None means 16 on CUDA, 4 on a CPU.
        shard: this process's part; None asks torch.distributed or the launcher's environment.
        synthesize: indices => `LabelledBatch` on `device`, instead of the checkpoint's own networks: for tests, and for
            synthesis that runs elsewhere. It must be a pure function of the indices, and picklable if workers spawn.

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
        filter: FilterKind | Filter | None = "rolling",
        truncation: float | None = None,
        num_samples: int | None = None,
        device: str | torch.device | None = None,
        output_device: str | torch.device | None = None,
        transforms: Callable[..., Any] | None = None,
        noise: NoiseKind = "const",
        score: ScoreKind = "top10_mean",
        precision: Precision | None = None,
        kernel: KernelKind = "auto",
        chunk_size: int | None = None,
        shard: Shard | None = None,
        synthesize: Synthesize | None = None,
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
        self.output_device = self.device if output_device is None else resolve_device(output_device)
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.chunk_size = chunk_size or default_chunk_size(self.device)
        self.options = SynthesisOptions(
            seed=check_seed(seed),
            truncation=self._source.truncation if truncation is None else truncation,
            noise=noise,
            score=score,
            precision=default_precision(self.device) if precision is None else precision,
            kernel=kernel,
        )
        compute_dtype(self.options.precision, self.device)  # what this device cannot do is said now
        self._filter = make_filter(filter)
        self._transform = None if transforms is None else JointTransform(transforms, seed)
        self._shard = shard
        self._epoch = 0
        self._walk: Walk | None = None
        self._resume: dict[str, Any] | None = None
        self._synthesize, self._given_synthesize = synthesize, synthesize is not None

    # Iteration -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Sample | LabelledBatch]:
        shard = self._my_shard()
        self._check_devices()
        filter = copy.deepcopy(self._filter)  # each iteration has a history of its own
        filter.start(self._source.calibration_scores(self.options))
        walk = Walk(filter, shard, self.chunk_size, self.num_samples, start=self._epoch * EPOCH_STRIDE)
        if self._resume is not None:
            _check_shard(self._resume["stream"]["shard"], shard)
            walk.load_state_dict(self._resume["walk"])
            self._resume = None
        self._walk = walk
        rows = walk.select(self._prefetch(walk.chunks()))
        if self.batch_size is None:
            return (self._sample(row) for row in rows)
        return self._batches(rows, self.batch_size, walk)

    def _prefetch(self, chunks: Iterable[range]) -> Iterator[Chunk]:
        """Finished chunks; the networks are prepared when the first one is asked for."""
        return prefetch(self._prepared(), chunks, self.device, self.output_device)

    def _batches(self, rows: Iterator[Row], size: int, walk: Walk) -> Iterator[LabelledBatch]:
        while taken := list(islice(rows, size)):
            yield self._batch(taken, next_index=walk.cursor)

    def _sample(self, row: Row) -> Sample:
        """One sample in memory of its own."""
        chunk, number = row
        with chunk.reading() as batch:
            (one,) = self._pieces(batch, [number])
            image, label = one.map(lambda tensor: tensor[0].clone())
        return image, label

    def _batch(self, rows: list[Row], *, next_index: int) -> LabelledBatch:
        """Samples of one or several chunks as one batch in memory of its own."""
        pieces: list[LabelledBatch] = []
        with ExitStack() as stack:
            for _, group in groupby(rows, key=lambda row: id(row[0])):
                chunks, numbers = zip(*group, strict=True)
                pieces += self._pieces(stack.enter_context(chunks[0].reading()), numbers)
            rows.clear()  # lets the chunks go before the consumer sets to work
            return LabelledBatch.concatenate(pieces, next_index=next_index)

    def _pieces(self, batch: LabelledBatch, rows: Sequence[int]) -> list[LabelledBatch]:
        if self._transform is None:
            return [batch.select(run) for run in consecutive(rows)]
        return [self._transform(batch.select([row])) for row in rows]

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of this seed, whether the filter keeps it or not; any int in [0, 2**63 - chunk_size)."""
        if not 0 <= index < MAX_INDEX - self.chunk_size:
            raise IndexError(f"index {index} addresses no sample; pass one in [0, 2**63 - {self.chunk_size})")
        self._check_devices()
        first = index // self.chunk_size * self.chunk_size
        (chunk,) = self._prefetch(iter([range(first, first + self.chunk_size)]))
        return self._sample((chunk, index - first))

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

        Load it into a stream built with the same options, before iterating. Batch size, transforms and output device
        may differ; the number of ranks and workers may if the states of all shards go through `merge_states`.
        """
        if self._resume is not None:
            return {**self._resume, "stream": self._identity()}  # a merged state becomes this shard's
        walk = None if self._walk is None else self._walk.state_dict()
        return {"version": STATE_VERSION, "stream": self._identity(), "epoch": self._epoch, "walk": walk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `iter()` continue exactly where `state_dict()` was taken.

        Args:
            state: of this shard, or of all shards by `merge_states`.

        Raises:
            ValueError: the state is of another version, or of a stream with other options or another shard; it says
                which option differs and what to do. Or it is merged, and this filter has a history.
        """
        check_version(state)
        mine, theirs = self._identity(), state["stream"]
        differ = options_that_differ(mine, theirs)
        if theirs["shard"] not in (None, mine["shard"]):
            differ.append("shard")
        for name in differ:
            raise ValueError(
                f"the state was saved with {name}={theirs.get(name)!r}, this stream has {name}={mine.get(name)!r}: "
                "resuming would repeat or skip samples without a word. Build the stream as it was, or start a new one "
                "with another seed" + (MERGE_REMEDY if name == "shard" else "")
            )
        if theirs["shard"] is None and not self._filter.index_only:
            raise ValueError(
                f"this is a merged state, and the filter {mine['filter']['name']!r} decides by what its own shard has "
                "seen before; begin a run with filter='block', 'threshold' or None"
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

    def _check_devices(self) -> None:
        for device in (self.device, self.output_device):
            check_device(device, in_worker=detect_worker() is not None)

    def _prepared(self) -> Synthesize:
        if self._synthesize is None:
            self._synthesize = Synthesizer(self._source.load(), self.options, self.device)
        return self._synthesize

    def __getstate__(self) -> dict[str, Any]:
        # A copy for another process starts where this stream would; it builds its own networks on first use.
        state = self.__dict__.copy()
        state["_resume"] = self.state_dict() if self._walk is not None else self._resume
        state["_walk"] = None
        if not self._given_synthesize:
            state["_synthesize"] = None
        return state


def _check_shard(saved: list[int] | None, shard: Shard) -> None:
    if saved not in (None, [shard.index, shard.count]):
        raise ValueError(
            f"the state belongs to shard {saved[0]} of {saved[1]}, this process is shard {shard.index} of "
            f"{shard.count}: a state loaded in the main process cannot position DataLoader workers. Use "
            "torchdata's StatefulDataLoader, which saves one state a worker, or num_workers=0" + MERGE_REMEDY
        )
