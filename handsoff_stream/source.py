"""Where a stream's networks come from, and what is certain about them: the bridge from a checkpoint to a stream.

The identity of a checkpoint covers all that decides samples: geometry, heads in their order, truncation, crop,
calibration, and weights. Of large tensors it takes 4096 evenly spaced weights, so that it costs a reading of the file
and no more; `verify=True` looks at all of them. Does not know indices, filters or devices.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from handsoff_stream.checkpoint import Calibration, Checkpoint, load_checkpoint, read_manifest, resolve
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.tensors import read_tensors
from handsoff_stream.isolation import isolated
from handsoff_stream.options import SynthesisOptions

SAMPLED_WEIGHTS = 4096  # per tensor
NOT_IDENTITY = {"fingerprint", "format_version", "provenance"}


class CheckpointSource:
    """A checkpoint named, located or loaded: checked at once, its networks built on first use in each process.

    Args:
        source: name, path, or a loaded checkpoint, which is copied when it is used and never changed.
        verify: compare all weights with the fingerprint that the checkpoint was saved with, when they are loaded.

    Raises:
        CheckpointError: missing or damaged, or without a labelling head.
    """

    def __init__(self, source: str | Path | Checkpoint, *, verify: bool = False):
        self._verify = verify
        self._loaded = source if isinstance(source, Checkpoint) else None
        self._path = None if isinstance(source, Checkpoint) else resolve(source)
        self.name = "a checkpoint in memory" if isinstance(source, Checkpoint) else str(source)
        """As the user said it."""
        with isolated():
            if isinstance(source, Checkpoint):
                self._manifest = source.manifest()
                self.fingerprint = identity(self._manifest, source.tensors())
            else:
                self._manifest = read_manifest(source)
                self.fingerprint = identity(self._manifest, _read(self._path))
        if not self._manifest["heads"]:
            raise CheckpointError(
                f"{self._path or 'this checkpoint'}: holds a generator but no labelling head, so there is nothing to "
                "label with; fit one with `handsoff-stream fit`"
            )

    @property
    def truncation(self) -> float:
        """psi that the checkpoint asks for."""
        return float(self._manifest["truncation"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of images and labels, in pixels."""
        height, width = self._manifest["output_size"]
        return height, width

    @property
    def class_names(self) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
        """Names of the classes by id, of the only head or by head; none for a head without classes."""
        heads = self._manifest["heads"]
        names = {name: tuple(head["task"].get("class_names", ())) for name, head in heads.items()}
        return names if len(names) > 1 else next(iter(names.values()))

    def calibration_scores(self, options: SynthesisOptions) -> list[float]:
        """Scores computed with these very options (but any seed); none if the checkpoint has no such."""
        calibration = self._manifest["calibration"]
        if calibration is None or calibration["options"] != options.calibrated_by():
            return []
        return list(calibration["scores"].get(options.score, []))

    def check(self, options: SynthesisOptions) -> None:
        """Find out before any work whether the checkpoint's heads can do what the options ask for.

        Raises:
            ValueError: as `class_means`.
        """
        found = self._manifest["calibration"]
        calibration = None if found is None else Calibration(**found)
        class_means(calibration, {k: head["task"] for k, head in self._manifest["heads"].items()}, options)

    def load(self) -> Checkpoint:
        """The checkpoint, for the caller alone.

        Raises:
            CheckpointError: it is not the one that the stream was built with any more, or `verify` finds other weights
                than were saved.
        """
        with isolated():
            checkpoint = copy.deepcopy(self._loaded) if self._path is None else load_checkpoint(self._path)
            assert checkpoint is not None
            manifest = checkpoint.manifest() if self._verify else self._manifest_of(checkpoint)
            found = identity(manifest, checkpoint.tensors())
        if found != self.fingerprint:
            raise CheckpointError(
                f"{self.name} has been changed since this stream was built, so samples would not be those that its "
                "saved states mean; build a new stream, and give each version of a checkpoint a file of its own"
            )
        if self._verify and manifest["fingerprint"] != self._manifest["fingerprint"]:
            raise CheckpointError(
                f"{self.name}: the weights are not those that were saved (fingerprint {manifest['fingerprint'][:12]}, "
                f"saved with {self._manifest['fingerprint'][:12]}); copy or write the file again"
            )
        return checkpoint

    def _manifest_of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        # `Checkpoint.manifest` hashes all weights, which takes longer than to read them.
        if self._path is not None:
            return read_manifest(self._path)
        return checkpoint.manifest()


def class_means(
    calibration: Calibration | None, tasks: Mapping[str, Mapping[str, Any]], options: SynthesisOptions
) -> dict[str, list[float | None]]:
    """Mean uncertainty of each class, by head; empty if the options do not ask for it.

    Args:
        calibration: of the checkpoint.
        tasks: `Task.config()` of every head, in order.
        options: of a stream.

    Raises:
        ValueError: options for classes, but no head with classes, or a first head without; the checkpoint was not
            calibrated with these options, or before the means were measured.
    """
    with_classes = [name for name, task in tasks.items() if task.get("class_names")]
    relative = " and ".join(f'{name}="class-relative"' for name in options.relative_to_classes)
    if (relative or options.labels == "soft") and not with_classes:
        raise ValueError(
            f"{relative or 'labels=' + repr(options.labels)} is for heads with classes, and none of {list(tasks)} has "
            "any; leave it out"
        )
    if not relative:
        return {}
    first = next(iter(tasks))
    if options.score == "class-relative" and first not in with_classes:
        raise ValueError(
            f'score="class-relative" judges the first head, and {first!r} has no classes; pass score="top10_mean"'
        )
    measured = {} if calibration is None else calibration.class_uncertainty
    missing = [name for name in with_classes if name not in measured]
    if calibration is None or missing or calibration.options != options.calibrated_by():
        conditions = ", ".join(f"{name}={value!r}" for name, value in options.calibrated_by().items())
        raise ValueError(
            f"{relative} compares with the mean uncertainty of each class, which this checkpoint does not hold for "
            f"{conditions}; calibrate it with `handsoff_stream.fitting.calibrate` and save it, or leave that out"
        )
    return {name: measured[name] for name in with_classes}


def identity(manifest: dict[str, Any], tensors: dict[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of everything in a checkpoint that decides samples, with at most `SAMPLED_WEIGHTS` of each tensor."""
    decisive = {name: value for name, value in manifest.items() if name not in NOT_IDENTITY}
    decisive["heads"] = list(manifest["heads"].items())  # the first one's uncertainty is the score
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for name, tensor in sorted(dict(tensors).items()):
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLED_WEIGHTS)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path | None) -> dict[str, Tensor]:
    assert path is not None
    return read_tensors(path, None)[1]
