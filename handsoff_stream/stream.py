"""HandsOffStream: walk my share of the index line, filter, hand out samples or batches, and know the position.

A sample is a pure function of (checkpoint, seed, index), so iteration is a walk over indices, a shard is a subset of
them, and the state of a stream is a position (and the filter's recent scores). Knows indices, scores and a callable
from indices to a batch. Does not know networks, tasks, files or CUDA.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Unpack, overload

import torch
from torch.utils.data import IterableDataset

from handsoff_stream.assembly import Assembly, Sample
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.device import check_device, default_chunk_size, resolve_device
from handsoff_stream.errors import StreamError
from handsoff_stream.filters import Filter, started_filter
from handsoff_stream.graphs import GraphedSynthesizer, check_graphs
from handsoff_stream.options import (
    FilterKind,
    IgnoreKind,
    KernelKind,
    LabelKind,
    NoiseKind,
    StreamOptions,
    SynthesisOptions,
    check_choices,
)
from handsoff_stream.position.dealing import Dealing, Line, addressed
from handsoff_stream.position.passing import Passes, Progress, StreamIterator
from handsoff_stream.position.resuming import Resumable
from handsoff_stream.position.state import State, pending_in, turned
from handsoff_stream.position.walk import BadSample, Walk
from handsoff_stream.precision import Precision, compute_dtype, default_precision
from handsoff_stream.prefetch import Chunk, Synthesize, prefetch, side_stream
from handsoff_stream.seeding import check_seed
from handsoff_stream.shard import Shard, Worker, detect, detect_worker
from handsoff_stream.source import CheckpointSource
from handsoff_stream.synthesizer import Synthesizer, in_chunks
from handsoff_stream.transforms import JointTransform
from handsoff_stream.uncertainty import ScoreKind
from handsoff_stream.wrapping import check_not_divided_again, check_not_pinned, warn_if_training_goes_on

T_co = TypeVar("T_co", covariant=True)


class HandsOffStream(Resumable, IterableDataset[T_co], Generic[T_co]):
    """An endless dataset of labelled images, synthesized while you train.

    With `batch_size=None` it yields samples `(image, label)` for `DataLoader(stream, batch_size=8)`; with
    `batch_size=n` it yields `LabelledBatch`es for `DataLoader(stream, batch_size=None)`, which collates nothing.
    image: float32 [3, H, W] in [0, 1] on 8-bit levels. label: int64 [H, W] (segmentation), float32 [K, H, W]
    (keypoint heatmaps) or float32 [1, H, W] (depth); a checkpoint with several heads gives a dict of labels by head.

    `stream[i]` regenerates sample i and `stream[i:j]` a batch, rejected or not; `random_split` and `Subset` go that
    way, so they include rejected samples: use `take` and `skip` to part training from validation. Ranks and DataLoader
    workers share the indices without overlap; samples have the same bits, and the same are kept, for any batch size,
    rank or worker count on the same kind of device. No global setting of PyTorch changes a sample.

    Every pass (`iter(stream)`) is an epoch: samples that no other pass has, unless `indices` or `take` name a part of
    the index line, which is then the same at every pass. An iterator owns its position; a pickle, a deep copy or a
    forked process begins where the stream was set to begin. The rank is looked up where the stream is iterated or
    pickled, and travels into workers.

    On a CPU the last bits also depend on the number of intra-op threads, which may sum in another order (with "faces"
    one and two agree). DataLoader workers keep the one thread that PyTorch gives them.

    Args:
        checkpoint: name of a checkpoint that ships ("faces"), path of a `.safetensors`, or a loaded `Checkpoint`.
        batch_size: None for samples, n for batches.
        as_dict: samples as dicts of image, label, uncertainty (float32 []) and index (int), for loops that want them.
        seed: which stream; in [0, 2**64).
        filter: "rolling" (default), "block", "threshold", None, or a `Filter`.
        truncation: psi on all layers around the mean latent; None means the checkpoint's own.
        epoch_size: accepted samples per epoch over all ranks; None means endless. Every rank hands out the same number,
            rounded up with further samples of the stream.
        drop_last: round down instead, to whole batches on every rank.
        indices: walk only this range of the index line, at every pass; None means all of it.
        device: where to synthesize; None means CUDA if there is one. CUDA synthesizes in the main process
            (`num_workers=0`), beside training, on a stream of its own. Samples lie on the device then, so a DataLoader
            needs `pin_memory=False` unless it is given batches.
        output_device: where samples lie, for instance "cuda:0" with device="cuda:1"; None means `device`.
        transforms: joint transform of image and label (torchvision v2), its randomness a function of (seed, index).
        image_dtype: torch.float32 in [0, 1], or torch.uint8 in [0, 255], the same levels in a fourth of the memory.
        noise: "const" (stored maps), "none", or "random" (fresh maps per index).
        score: image score, "top10_mean" (published code), "sum" (HandsOff, section 3.3), or "class-relative", which
            compares each class with its usual uncertainty.
        labels: of segmentation, "hard" class ids, or "soft" class probabilities float32 [K, H, W].
        ignore: "none", or "class-relative": pixels above `ignore_factor` times their class's mean uncertainty have no
            label (id 255, or probabilities that are all zero); a factor of 1.25 is FreeMask's.
        precision: of images and labels, "exact" (float32) or "fast" (16-bit products: float16 on CUDA, bfloat16 on a
            CPU that has it); None means "fast" on CUDA, else "exact".
        kernel: of labels, "triton" (one fused CUDA kernel), "torch", or "auto".
        chunk_size: indices synthesized at once, part of what decides a sample's last bits; None means 16 on CUDA, 4 on
            a CPU.
        shard: this process's part; None asks torch.distributed or the launcher's environment.
        on_bad_sample: what to do about a sample whose uncertainty is not finite: "raise", or "skip" and count it.
        verify: compare all weights with the checkpoint's fingerprint when they are loaded, not 4096 of each tensor.
        graphs: replay CUDA graphs instead of launching kernels one by one; changes no sample, untried on a GPU so far.
        synthesize: indices => `LabelledBatch` on `device`, instead of the checkpoint's own networks: for tests, and for
            synthesis that runs elsewhere. It must be a pure function of the indices, and picklable if workers spawn.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or has no labelling head.
        ValueError: an option out of its range, or one that needs a calibration that is not there.
    """

    @overload
    def __init__(
        self: "HandsOffStream[LabelledBatch]",
        checkpoint: str | Path | Checkpoint,
        *,
        batch_size: int,
        **options: Unpack[StreamOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "HandsOffStream[Sample]",
        checkpoint: str | Path | Checkpoint,
        *,
        batch_size: None = None,
        as_dict: Literal[False] = False,
        **options: Unpack[StreamOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: "HandsOffStream[dict[str, Any]]",
        checkpoint: str | Path | Checkpoint,
        *,
        batch_size: None = None,
        as_dict: Literal[True],
        **options: Unpack[StreamOptions],
    ) -> None: ...
    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        batch_size: int | None = None,
        as_dict: bool = False,
        seed: int = 0,
        filter: FilterKind | Filter | None = "rolling",
        truncation: float | None = None,
        epoch_size: int | None = None,
        drop_last: bool = False,
        indices: range | None = None,
        device: str | torch.device | None = None,
        output_device: str | torch.device | None = None,
        transforms: Callable[..., Any] | None = None,
        image_dtype: torch.dtype = torch.float32,
        noise: NoiseKind = "const",
        score: ScoreKind = "top10_mean",
        labels: LabelKind = "hard",
        ignore: IgnoreKind = "none",
        ignore_factor: float = 1.25,
        precision: Precision | None = None,
        kernel: KernelKind = "auto",
        chunk_size: int | None = None,
        shard: Shard | None = None,
        on_bad_sample: BadSample = "raise",
        verify: bool = False,
        graphs: bool = False,
        synthesize: Synthesize | None = None,
    ) -> None:
        Resumable.__init__(self)
        check_choices(batch_size, epoch_size, chunk_size, as_dict, image_dtype, on_bad_sample)
        self._source = CheckpointSource(checkpoint, verify=verify)
        self.device = resolve_device(device)
        self.output_device = self.device if output_device is None else resolve_device(output_device, computes=False)
        check_graphs(graphs, self.device)
        self._graphs = graphs
        self.batch_size, self.epoch_size, self.drop_last = batch_size, epoch_size, drop_last
        self.chunk_size = chunk_size or default_chunk_size(self.device)
        psi = self._source.truncation if truncation is None else truncation
        chosen = default_precision(self.device) if precision is None else precision
        compute_dtype(chosen, self.device)  # what this device cannot do is said now
        self.options = SynthesisOptions(
            seed=check_seed(seed), truncation=psi, noise=noise, score=score, labels=labels, ignore=ignore,
            ignore_factor=ignore_factor, precision=chosen, kernel=kernel,
        )  # fmt: skip
        self._source.check(self.options)
        self._filter = started_filter(filter, self._source.calibration_scores(self.options))
        transform = None if transforms is None else JointTransform(transforms, seed)
        self.assembly = Assembly(transform, image_dtype, as_dict)
        self._line = Line.of(indices)
        self._on_bad_sample: BadSample = on_bad_sample
        self._shard = shard
        self._carried_rank: Shard | None = None
        self._synthesize, self._given_synthesize = synthesize, synthesize is not None

    # Iteration -------------------------------------------------------------------------------------------------

    def __iter__(self) -> StreamIterator[T_co]:
        """A new pass: the loaded state's if one was loaded, else the next epoch."""
        worker = detect_worker()
        self._check_devices(worker)
        self._check_not_divided_again(worker)
        if self.batch_size is None:
            check_not_pinned(self, self.output_device)
        if self._passes.begins_anew(worker):
            warn_if_training_goes_on()
        epoch, state = self._passes.begin(worker)
        progress = self._new_progress(state, epoch, worker)
        self._progress = os.getpid(), progress
        walk = progress.walk
        rows = walk.select(self._prefetch(walk.chunks()))
        items = self.assembly.items(rows, self.batch_size, progress.pending)
        return StreamIterator(items, progress)

    def _new_progress(self, state: State | None, epoch: int, worker: Worker | None) -> Progress:
        rank, indices = self._rank(worker), self._line.indices(epoch)
        worker = turned(worker, rank, state)
        if rank.count > 1 and self.epoch_size is None and self._line.stop is not None:
            raise StreamError(
                f"how many samples of indices={indices} the filter keeps differs between the {rank.count} ranks, so "
                "some would wait forever for others that have ended; pass epoch_size=..., or shard=Shard(0, 1) to let "
                "every rank walk all of them"
            )
        part = self._dealing.part(state, rank, worker)
        shard = rank if worker is None else rank.split(worker.index, worker.count)
        walk = Walk(
            self._filter, shard, self.chunk_size, indices=indices, left=part.left, on_bad_sample=self._on_bad_sample
        )
        if state is not None and state["walk"] is not None:
            saved = Shard(*state["shard"] or (0, 1))
            walk.load_state_dict(state["walk"], saved=saved, same_shard=part.same_shard)
        return Progress(walk, epoch, part, self._identity(), pending_in(state, walk))

    def _prefetch(self, chunks: Iterable[range]) -> Iterator[Chunk]:
        """Finished chunks of these indices."""
        return prefetch(self._prepared(), chunks, self.device, self.output_device)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> LabelledBatch: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Sample `index` of this seed, or a batch of the samples of a slice, whether the filter keeps them or not.

        Any int in [0, 2**63 - chunk_size). With `batch_size=n` an int gives the plain sample, too.

        Raises:
            IndexError: an index without a sample, or a slice without an end, or of nothing.
        """
        self._check_devices(detect_worker())
        parts = list(in_chunks(addressed(index, self.chunk_size), self.chunk_size))
        chunks = self._prefetch(iter([chunk for chunk, _, _ in parts]))
        rows = [(chunk, row) for chunk, (_, some, _) in zip(chunks, parts, strict=True) for row in some]
        return self.assembly.batch(rows) if isinstance(index, slice) else self.assembly.sample(rows[0])

    def __len__(self) -> int:
        """Samples (or batches) that this rank yields per epoch, on every rank the same, for any number of workers.

        A DataLoader that collates samples itself does so in each worker, and so may yield a few short batches more than
        its own length; build the stream with `batch_size` to have exactly that length.

        Raises:
            TypeError: the stream is endless (`epoch_size=None`), or a mixture of samples whose number is not known.
        """
        return self._dealing.length(self._rank(detect_worker()).count)

    # Other streams -----------------------------------------------------------------------------------------------

    def take(self, count: int) -> "HandsOffStream[T_co]":
        """The stream of the first `count` indices alone, kept or not; its passes repeat. For validation."""
        return self._with_line(self._line.take(count))

    def skip(self, count: int) -> "HandsOffStream[T_co]":
        """The stream without the first `count` indices: disjoint from `take(count)`."""
        return self._with_line(self._line.skip(count))

    def _with_line(self, line: Line) -> "HandsOffStream[T_co]":
        twin = copy.copy(self)
        twin._line, twin._passes = line, Passes()
        return twin

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels, before any transforms."""
        return self._source.size

    @property
    def class_names(self) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
        """Class names by id: of the only head, or by head; empty for a head without classes."""
        return self._source.class_names

    # What a state must share -------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {
            "checkpoint": self._source.fingerprint,
            "device": self.device.type,
            "chunk_size": self.chunk_size,
            "filter": self._filter.config(),
            "epoch_size": self.epoch_size,
            "indices": [self._line.first, self._line.stop],
            **self.options.config(),
            **({} if self.assembly.companions is None else self.assembly.companions.identity()),
        }

    @property
    def _dealing(self) -> Dealing:
        return Dealing(self.epoch_size, self.batch_size, self.drop_last, self.assembly.ratio)

    def _rank(self, worker: Worker | None) -> Shard:
        if self._shard is not None:
            return self._shard
        return self._carried_rank if worker is not None and self._carried_rank is not None else detect()

    def _check_not_divided_again(self, worker: Worker | None) -> None:
        if self._shard is None:
            check_not_divided_again(self._rank(worker).count)

    def _check_devices(self, worker: Worker | None) -> None:
        for device in (self.device, self.output_device):
            check_device(device, in_worker=worker is not None)

    def _prepared(self) -> Synthesize:
        if self._synthesize is None:
            with side_stream(self.device):
                synthesizer = Synthesizer(self._source.load(), self.options, self.device)
            graphed = GraphedSynthesizer(synthesizer) if self._graphs else synthesizer
            self._synthesize = lambda indices: graphed(indices).packed()
        return self._synthesize

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins where this stream was set to begin; it builds its own networks on first use. A worker that is
        # being spawned cannot ask torch.distributed, so the rank goes with it.
        self._check_not_divided_again(detect_worker())
        if get_spawning_popen() is not None and self._passes.begins_anew(detect_worker()):
            warn_if_training_goes_on()
        state = {**self.__dict__, "_carried_rank": self._rank(detect_worker()), "_progress": None}
        return state if self._given_synthesize else {**state, "_synthesize": None}

    def __copy__(self) -> "HandsOffStream[T_co]":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__getstate__(), _passes=copy.deepcopy(self._passes), _synthesize=self._synthesize)
        return twin

    def __repr__(self) -> str:
        filter = self._filter.config()["name"]
        shown = f"{self._source.name!r}, batch_size={self.batch_size}, seed={self.options.seed}, filter={filter!r}"
        beside = "" if self.assembly.companions is None else f", companions={self.assembly.companions}"
        return f"HandsOffStream({shown}, epoch_size={self.epoch_size}, device={str(self.device)!r}{beside})"
