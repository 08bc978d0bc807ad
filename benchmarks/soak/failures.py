"""With failures: a run that fails as a training run can, and goes on from the file of its position."""

import functools
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors  # noqa: F401  (transforms import it, which takes seconds in every worker)

from benchmarks.geometries import random_checkpoint
from benchmarks.processes import in_fresh_process
from benchmarks.soak.windows import Windows
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.errors import OutputError
from handsoff_stream.files.atomic import write_file
from handsoff_stream.filters import RollingPercentile
from handsoff_stream.fitting.calibration import calibrate
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer

BATCH_SIZE = 8
CHUNK_SIZE = 32
WINDOW = 200
"""Scores that the rolling filter remembers per lane."""
SAVE_EVERY = 5
"""Batches between two files of the stream's position."""
BATCHES_PER_FAILURE = 100
"""On average."""
NOT_FINITE_OF = 997
"""One index of so many has a sample that is not finite."""
FAILURES = ("transform", "worker killed", "disk")

Numbers = NDArray[np.int64]


@functools.cache
def tiny_checkpoint() -> Checkpoint:
    """Random weights, 16 x 16 pixels, 3 classes: every part of a stream, at a thousandth of its cost."""
    checkpoint = random_checkpoint(16, channels=(6, 5, 4), hidden=(7, 5), members=3, classes=3, latent=8)
    return calibrate(checkpoint, num_samples=500)


class SometimesNotFinite:
    """The tiny checkpoint's samples, of which some have a score of NaN: a function of their indices."""

    def __init__(self) -> None:
        checkpoint = tiny_checkpoint()
        options = SynthesisOptions(truncation=checkpoint.truncation)
        self._synthesizer = Synthesizer(checkpoint, options, torch.device("cpu"))

    def __call__(self, indices: Sequence[int]) -> LabelledBatch:
        batch = self._synthesizer(indices)
        broken = batch.indices % NOT_FINITE_OF == NOT_FINITE_OF // 2
        return replace(batch, uncertainty=batch.uncertainty.masked_fill(broken, torch.nan))


class RaisesAt:
    """A transform that changes nothing and fails at its n-th call."""

    def __init__(self, call: int) -> None:
        self._left = call

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        self._left -= 1
        if self._left < 0:
            raise ArithmeticError("the transform failed")
        return image, label


@contextmanager
def disk_refuses(refuses: bool) -> Iterator[None]:
    """Inside, the system refuses to make files larger than 100 bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if refuses:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Log:
    """Index and checksum of every sample of a run, in the order in which they were handed out; its memory is fixed."""

    def __init__(self, size: int) -> None:
        self.indices: Numbers = np.zeros(size, np.int64)
        self.checksums: Numbers = np.zeros(size, np.int64)
        self.length = 0

    def add(self, batch: LabelledBatch) -> None:
        """Append what fits of a batch."""
        assert isinstance(batch.labels, Tensor)
        for index, image, label in zip(batch.indices.tolist(), batch.images, batch.labels, strict=True):
            if self.length == len(self.indices):
                return
            self.indices[self.length] = index
            self.checksums[self.length] = zlib.crc32(label.numpy().tobytes(), zlib.crc32(image.numpy().tobytes()))
            self.length += 1

    def full(self) -> bool:
        """Whether nothing more is wanted."""
        return self.length == len(self.indices)


def make_loader(synthesize: SometimesNotFinite, workers: int, fails_at: int | None) -> HandsOffLoader[LabelledBatch]:
    """The loader of one life of a run; `fails_at`: calls of the transform in each worker until it fails."""
    stream = HandsOffStream(
        tiny_checkpoint(),
        batch_size=BATCH_SIZE,
        device="cpu",
        synthesize=synthesize,
        transforms=None if fails_at is None else RaisesAt(fails_at),
        filter=RollingPercentile(window=WINDOW),
        chunk_size=CHUNK_SIZE,
        on_bad_sample="skip",
    )
    return HandsOffLoader(stream, num_workers=workers)


def without_failures(samples: int, workers: int) -> Log:
    """The log of a run that nothing disturbs."""
    log = Log(samples)
    for batch in make_loader(SometimesNotFinite(), workers, None):
        log.add(batch)
        if log.full():
            break
    return log


class Run:
    """A run that fails and goes on again and again.

    Args:
        samples: to hand out.
        workers: DataLoader processes, at least two.
        folder: for the file of the position.
        seed: of the kinds and times of failures.
        batches_per_failure: on average.
    """

    def __init__(self, samples: int, workers: int, folder: Path, seed: int, batches_per_failure: int) -> None:
        self.log = Log(samples)
        self.failures = dict.fromkeys(FAILURES, 0)
        self.skipped = 0
        """Samples that were dropped because they were not finite, up to the last file of the position."""
        self.handed_out = 0
        """Samples that came, those included that a failure made worthless."""
        self._workers, self._file = workers, folder / "position.json"
        self._dice, self._longest = random.Random(seed), 2 * batches_per_failure - 1
        self._kinds: list[str] = []
        self._synthesize = SometimesNotFinite()

    def live(self) -> None:
        """From the last file of the position to the next failure, or to the end."""
        self._kinds = self._kinds or self._dice.sample(FAILURES, len(FAILURES))
        kind, at = self._kinds.pop(), self._dice.randint(1, self._longest)
        calls = at * BATCH_SIZE // self._workers if kind == "transform" else None
        loader = make_loader(self._synthesize, self._workers, calls)
        self.log.length, skipped = 0, 0
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            loader.load_state_dict(saved["stream"])
            self.log.length, skipped = saved["length"], saved["skipped"]
        try:
            self._train(loader, kind, at, skipped)
        except (ArithmeticError, EOFError, OSError, RuntimeError) as error:
            self.failures[_kind_of(error)] += 1
        del loader
        gc.collect()  # or the next life's workers would inherit the remains of this one's

    def _train(self, loader: HandsOffLoader[LabelledBatch], kind: str, at: int, skipped: int) -> None:
        for number, batch in enumerate(loader, 1):
            self.log.add(batch)
            self.handed_out += len(batch)
            if kind == "worker killed" and number == at:
                os.kill(self._dice.choice(multiprocessing.active_children()).pid or 0, signal.SIGKILL)
            if number % SAVE_EVERY == 0 or self.log.full():
                self._save(loader, skipped, refused=kind == "disk" and number >= at)
            if self.log.full():
                return

    def _save(self, loader: HandsOffLoader[LabelledBatch], skipped: int, *, refused: bool) -> None:
        state = loader.state_dict()
        skipped += state["walk"]["counts"]["skipped"]  # several workers count anew in every life
        content = json.dumps({"stream": state, "length": self.log.length, "skipped": skipped}).encode()
        with disk_refuses(refused):
            write_file(self._file, content)
        self.skipped = skipped


def _kind_of(error: Exception) -> str:
    """Which of `FAILURES` an exception comes from; any other is raised again."""
    if isinstance(error, ArithmeticError):
        return "transform"
    if isinstance(error, OutputError):
        return "disk"
    # A worker that is killed while it hands a tensor over leaves a connection without an end.
    if isinstance(error, EOFError | ConnectionError | FileNotFoundError) or "DataLoader worker" in str(error):
        return "worker killed"
    raise error


def differences(expected: Log, found: Log) -> dict[str, int]:
    """Of a run: samples that are missing, that came twice, that are elsewhere in the order, and with other pixels."""
    found_indices, expected_indices = found.indices[: found.length], expected.indices[: found.length]
    times = Counter(found_indices.tolist())
    return {
        "lost": len(set(expected_indices.tolist()) - set(times)),
        "twice": sum(count - 1 for count in times.values()),
        "elsewhere": int((found_indices != expected_indices).sum()),
        "other_pixels": int((found.checksums[: found.length] != expected.checksums[: found.length]).sum()),
    }


def run_failures(
    samples: int, *, workers: int, windows: int, seed: int = 0, batches_per_failure: int = BATCHES_PER_FAILURE
) -> Iterator[dict[str, Any]]:
    """The result after each window, until all samples have been handed out."""
    expected = in_fresh_process(without_failures, samples, workers)
    measured, lives = Windows(of_pairs=samples // windows), 0
    with tempfile.TemporaryDirectory() as folder:
        run = Run(samples, workers, Path(folder), seed, batches_per_failure)
        while not run.log.full():
            run.live()
            lives += 1
            if measured.update(run.handed_out) or run.log.full():
                yield {
                    "finished": run.log.full(),
                    "samples": run.log.length,
                    "lives": lives,
                    "failures": dict(run.failures),
                    "skipped_not_finite": run.skipped,
                    "open_files": len(os.listdir("/proc/self/fd")),
                    **differences(expected, run.log),
                    **measured.summary(),
                }
