"""One file that holds everything a stream needs: generator, labelling heads, calibration scores, provenance.

A `.safetensors` container whose header carries one JSON manifest; nothing in it can execute. It is the only bridge
between the offline half (inversion, fitting) and the online half (streaming). Does not know how any part was trained.
"""

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.schema import arguments_of, validated
from handsoff_stream.files.tensors import is_safetensors, write_tensors
from handsoff_stream.files.weights import build
from handsoff_stream.generators import Generator
from handsoff_stream.generators.published import native, read_generator
from handsoff_stream.geometry import Rectangle
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.provenance import sha256, versions
from handsoff_stream.tasks import TASKS, Task, task_from_config

ASSETS = Path(__file__).parent / "assets"
DEFAULT_TRUNCATION = 0.7  # what the published code applies, around the mean latent


@dataclass(frozen=True)
class Head:
    """What to predict, and the ensemble that predicts it."""

    task: Task
    label_generator: LabelGenerator


@dataclass(frozen=True)
class Calibration:
    """Image scores of a seeded sample, from which a rolling filter's window starts."""

    options: dict[str, Any]
    """The synthesis options they were computed with, without seed and kind of score."""
    scores: dict[str, list[float]]
    """Kind of score, see `SynthesisOptions.score` => one score per sample."""
    class_uncertainty: dict[str, list[float | None]] = field(default_factory=dict)
    """Head with classes => mean uncertainty of all pixels of each class; None for a class that no sample shows. Empty
    if the checkpoint was calibrated before it was measured."""

    def config(self) -> dict[str, Any]:
        """JSON-able, as a manifest holds it."""
        known = asdict(self)
        return known if self.class_uncertainty else {k: v for k, v in known.items() if k != "class_uncertainty"}


@dataclass(frozen=True)
class Checkpoint:
    """A generator and what is needed to label and filter its images."""

    generator: Generator
    heads: dict[str, Head] = field(default_factory=dict)
    """Labelling heads by name; the first one's uncertainty is the image score."""
    output_size: tuple[int, int] | None = None
    """Height and width of images and labels; None means one pixel for each of the generator's."""
    truncation: float = DEFAULT_TRUNCATION
    calibration: Calibration | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the parts come from: source files with sha256, command, versions."""
    crop: Rectangle | None = None
    """The part of the generator's image that is streamed, in its pixels; None means all of it.
    StyleGAN2's cars fill rows 64 to 448 of 512, the rest is black bars."""

    def __post_init__(self) -> None:
        if self.crop is not None:
            self.crop.check(self.generator.resolution)
            self.crop.placement(self.size, self.generator.resolution)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images and labels that a stream yields."""
        return self.output_size or (self.generator.resolution if self.crop is None else self.crop.size)

    def cropped(self, part: Rectangle) -> "Checkpoint":
        """A checkpoint that streams `part` of the generator's image, in its pixels, at the scale of this one.

        Raises:
            ValueError: this one is cropped already, or the edges of the part cut output pixels.
        """
        if self.crop is not None:
            raise ValueError(f"this checkpoint streams {tuple(self.crop)} of its images already; crop the original")
        whole = self.generator.resolution
        height, width = (side * out / full for side, out, full in zip(part.size, self.size, whole, strict=True))
        if not (height.is_integer() and width.is_integer()):
            raise ValueError(
                f"{tuple(part)} of {whole[0]} x {whole[1]} pixels would cut output pixels of {self.size[0]} x "
                f"{self.size[1]}; move its edges between them"
            )
        return replace(self, crop=part, output_size=(int(height), int(width)), calibration=None)

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name: `generator.*` and `heads.<name>.*`."""
        named = {f"{native.PREFIX}{k}": v for k, v in self.generator.state_dict().items()}
        for name, head in self.heads.items():
            named |= {f"heads.{name}.{k}": v for k, v in head.label_generator.state_dict().items()}
        return named

    def manifest(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able, with the fingerprint of what decides the samples."""
        identity = {
            "format_version": native.FORMAT_VERSION,
            "generator": {"family": self.generator.family, "config": self.generator.config()},
            "heads": {
                name: {"task": head.task.config(), "label_generator": head.label_generator.config()}
                for name, head in self.heads.items()
            },
            "output_size": list(self.size),
            "truncation": self.truncation,
        }
        if self.crop is not None:
            identity["crop"] = self.crop._asdict()
        calibration = None if self.calibration is None else self.calibration.config()
        fingerprint = _fingerprint(identity, self.tensors())
        return {
            **identity,
            "calibration": calibration,
            "fingerprint": fingerprint,
            "provenance": self.provenance,
        }


def _fingerprint(identity: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: file to write, `.safetensors`; replaced if it exists.
        checkpoint: what to write.
        half: store weights of two and more dimensions as float16, half the size; arithmetic stays float32. The
            rounded weights label a little differently, so calibrate what `load_checkpoint` gives back, not the
            original.

    Raises:
        CheckpointError: a weight is NaN or infinite, or leaves float16's range.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    if half:
        checkpoint = _rounded(checkpoint)
    tensors = checkpoint.tensors()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"tensor {name!r} holds NaN or infinite values, so {path} was not written; the training that made "
                "it diverged" + (", or its weights exceed float16: pass half=False" if half else "")
            )
        if half and tensor.ndim >= 2:
            tensors[name] = tensor.half()
    write_tensors(path, tensors, key=native.MANIFEST_KEY, manifest=checkpoint.manifest())


def _rounded(checkpoint: Checkpoint) -> Checkpoint:
    # The manifest's fingerprint must be that of the weights as they will be read.
    copied = copy.deepcopy(checkpoint)
    for module in (copied.generator, *(head.label_generator for head in copied.heads.values())):
        for tensor in module.state_dict().values():
            if tensor.ndim >= 2:
                tensor.copy_(tensor.half())
    return copied


def resolve(name_or_path: str | Path) -> Path:
    """Name of a checkpoint that ships, or path of a file of any kind => path of the file.

    Raises:
        CheckpointError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = ASSETS / f"{name_or_path}.safetensors"
    if path.name == str(name_or_path) and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in ASSETS.glob("*.safetensors"))
    raise CheckpointError(
        f"{name_or_path}: no such file, and no checkpoint of that name ships; pass a path or one of {names}"
    )


def read_manifest(name_or_path: str | Path) -> dict[str, Any]:
    """The manifest alone, without reading the weights.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    return native.read_manifest(resolve(name_or_path))


def load_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Read a checkpoint: everything on the CPU, float32, in eval mode, without gradients.

    Args:
        name_or_path: name of a checkpoint that ships ("faces") or a path.

    Raises:
        CheckpointError: missing, truncated or foreign file, newer format version, unknown generator family or task,
            weights that do not fit the manifest or are NaN.
    """
    path = resolve(name_or_path)
    manifest, tensors = native.read(path)
    _check_names(path, manifest, tensors)
    generator = native.build_generator(path, manifest, tensors).eval().requires_grad_(False)
    try:
        heads = {name: _load_head(name, entry, tensors, generator) for name, entry in manifest["heads"].items()}
        calibration = _calibration(path, manifest["calibration"], heads)
        return Checkpoint(
            generator,
            heads,
            output_size=(manifest["output_size"][0], manifest["output_size"][1]),
            truncation=float(manifest["truncation"]),
            calibration=calibration,
            provenance=manifest["provenance"],
            crop=Rectangle(**manifest["crop"]) if "crop" in manifest else None,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: heads or manifest cannot be used ({error}); write the file again") from error


def _calibration(path: Path, entry: dict[str, Any] | None, heads: dict[str, Head]) -> Calibration | None:
    if entry is None:
        return None
    calibration = Calibration(**entry)
    for name, means in calibration.class_uncertainty.items():
        if name not in heads or len(means) != heads[name].task.num_outputs:
            raise CheckpointError(
                f"{path}: its calibration has the uncertainty of {len(means)} classes of {name!r}, which is no head "
                "with so many; calibrate it again"
            )
    return calibration


def _check_names(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    prefixes = (native.PREFIX, *(f"heads.{name}." for name in manifest["heads"]))
    stray = sorted(name for name in tensors if not name.startswith(prefixes))
    if stray:
        raise CheckpointError(f"{path}: {len(stray)} tensors belong to no part of it, such as {stray[0]!r}")


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """A checkpoint, or a published generator file as a checkpoint without heads.

    Raises:
        CheckpointError: no such file or name, or a file that is neither.
    """
    path = resolve(name_or_path)
    return load_checkpoint(path) if is_safetensors(path) else import_generator(path)


def import_generator(path: str | Path, *, average_latent: str | Path | None = None) -> Checkpoint:
    """Checkpoint without heads of a published generator file; its provenance names the file and its sha256.

    Args:
        path: see `generators.load_generator`.
        average_latent: see `generators.load_generator`.

    Raises:
        CheckpointError: a file that cannot be read, or one that is a handsoff_stream checkpoint already.
    """
    path = Path(path)
    if path.is_file() and is_safetensors(path):
        raise CheckpointError(f"{path}: is a handsoff_stream checkpoint already; there is nothing to convert")
    read = read_generator(path, average_latent=average_latent)
    files = [path] if average_latent is None else [path, Path(average_latent)]
    provenance = {
        "sources": {file.name: sha256(file) for file in files},
        "source_format": read.source,
        "versions": versions(),
    }
    return Checkpoint(read.generator, provenance=provenance)


def _load_head(name: str, entry: dict[str, Any], tensors: dict[str, Tensor], generator: Generator) -> Head:
    task = _load_task(name, entry["task"])
    arguments: dict[str, Any] = entry["label_generator"]
    expected_channels = list(generator.feature_channels)
    if (arguments["feature_channels"], arguments["num_outputs"]) != (expected_channels, task.num_outputs):
        raise CheckpointError(
            f"head {name!r} labels {arguments['num_outputs']} outputs from maps of {arguments['feature_channels']} "
            f"channels; its task has {task.num_outputs}, the generator {expected_channels}"
        )
    prefix = f"heads.{name}."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    with torch.device("meta"):
        expected = LabelGenerator(**arguments)
    label_generator = build(lambda: LabelGenerator(**arguments), expected, state)
    return Head(task, label_generator.eval().requires_grad_(False))


def _load_task(name: str, config: dict[str, Any]) -> Task:
    kind = TASKS.get(config.get("name", ""))
    if kind is not None:
        fields = {key: value for key, value in config.items() if key != "name"}
        validated(arguments_of(kind), fields, f"the task of head {name!r}")
    return task_from_config(config)
