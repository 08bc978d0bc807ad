"""Label generators and latents as HandsOff and DatasetGAN published them => ours.

An experiment is a JSON file and a folder of `model_0.pth`, `model_1.pth`, ..., one per member. Knows their names and
layout. Does not know containers (`files.containers`, which executes nothing), class names, or how members were
trained.

Shape letters: M members, N images, L number of style inputs, D latent size, C feature channels, K outputs, H W label
size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import MAX_LEVELS, MAX_MEMBERS, MAX_SIDE, MAX_WIDTH
from handsoff_stream.files.containers import read_content
from handsoff_stream.files.schema import read_json
from handsoff_stream.files.strict_pickle import shown
from handsoff_stream.geometry import Rectangle, Size
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.provenance import sha256
from handsoff_stream.tasks import Task


@dataclass(frozen=True)
class Experiment:
    """What an experiment's JSON states about its label generator."""

    size: Size
    """(H, W) of the labels; `dim[:2]`."""
    num_channels: int
    """C of the hypercolumns; `dim[2]`."""
    members: int
    """M; `ensemble_size` (HandsOff) or `model_num` (DatasetGAN)."""
    stylegan: str
    """The generator's file; `stylegan_checkpoint`, "" if it is not given."""


@dataclass(frozen=True)
class PublishedLabelGenerator:
    """A label generator, and what it was read from."""

    label_generator: LabelGenerator
    """On the CPU, float32, in eval mode, without gradients."""
    experiment: Experiment
    sources: dict[str, str]
    """File name => sha256."""

    def attach_to(self, base: Checkpoint, task: Task) -> Checkpoint:
        """`base` with this label generator as its only head; not calibrated.

        Images and labels have the experiment's size. Where that is wider than the generator's image (cars: 384 x 512),
        they are the rows in its middle (64 to 448 of 512), as in the published code.

        Args:
            base: `import_generator` of the experiment's StyleGAN.
            task: what the K outputs mean, such as `Segmentation` with K classes.

        Raises:
            ValueError: a task of another number of outputs, or labels of a shape that no block of whole rows has.
        """
        num_outputs = self.label_generator.num_outputs
        if task.num_outputs != num_outputs:
            raise ValueError(
                f"the label generator has {num_outputs} outputs, the task takes {task.num_outputs}; "
                f"name {num_outputs} classes"
            )
        sources = {**base.provenance.get("sources", {}), **self.sources}
        return replace(
            base,
            heads={task.name: Head(task, self.label_generator)},
            output_size=self.experiment.size,
            crop=_middle_rows(self.experiment.size, base.generator.resolution),
            calibration=None,
            provenance={**base.provenance, "sources": sources},
        )


def read_experiment(path: str | Path) -> Experiment:
    """Read an experiment's JSON, HandsOff's or DatasetGAN's.

    Raises:
        CheckpointError: no such file, no JSON, or entries missing.
    """
    path = Path(path)
    try:
        entries = read_json(path, "an experiment")
        height, width, channels = (int(number) for number in entries["dim"])
        members = int(entries["ensemble_size"] if "ensemble_size" in entries else entries["model_num"])
        experiment = Experiment((height, width), channels, members, str(entries.get("stylegan_checkpoint", "")))
    except CheckpointError:
        raise
    except Exception as error:  # JSON of something else may hold anything
        raise CheckpointError(
            f"{path}: no experiment of HandsOff or DatasetGAN ({type(error).__name__}: {error}); it is JSON with "
            "dim: [H, W, C], and ensemble_size or model_num"
        ) from error
    limits = (MAX_SIDE, MAX_SIDE, MAX_WIDTH * 2 * MAX_LEVELS, MAX_MEMBERS)
    numbers = (height, width, channels, members)
    if any(not 1 <= number <= limit for number, limit in zip(numbers, limits, strict=True)):
        raise CheckpointError(
            f"{path}: dim {[height, width, channels]} and {members} members make no label generator; correct the JSON"
        )
    return experiment


def read_label_generator(
    experiment: str | Path, feature_channels: Sequence[int], *, folder: str | Path | None = None
) -> PublishedLabelGenerator:
    """Read all members of a published label generator; nothing in the files is executed.

    Args:
        experiment: the JSON file.
        feature_channels: of the generator that it labels.
        folder: where `model_<i>.pth` lie; by default the folder of the JSON file.

    Raises:
        CheckpointError: a file that is missing, damaged, hostile or something else; members that differ in geometry; a
            generator whose hypercolumns have another number of channels.
    """
    path = Path(experiment)
    read = read_experiment(path)
    if read.num_channels != sum(feature_channels):
        raise CheckpointError(
            f"{path}: reads hypercolumns of {read.num_channels} channels, the generator's have {sum(feature_channels)}"
            f"; pass the generator that it was made for (stylegan_checkpoint: {read.stylegan!r})"
        )
    files = [(Path(folder) if folder is not None else path.parent) / f"model_{i}.pth" for i in range(read.members)]
    states = [_read_member(file) for file in files]
    try:
        label_generator = LabelGenerator.from_published_state_dicts(states, feature_channels)
    except ValueError as error:
        raise CheckpointError(f"{files[0].parent}: {error}") from error
    sources = {file.name: sha256(file) for file in (path, *files)}
    return PublishedLabelGenerator(label_generator.requires_grad_(False), read, sources)


def read_latents(path: str | Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Published latents of some images: name => float32 [L, D] (w+), or [D] (z or w, see `LatentSpace`).

    Three kinds of `.npy` file exist. ReStyle writes {file name: [latent of each iteration]}: an image gets the last
    iteration of the entry of its name. HandsOff's formatted and optimized latents are one array [N, L, D], those of
    DatasetGAN's annotated samples one array [N, D]: an image gets the row of the first integer in its name.

    Args:
        path: the file.
        names: of the images, with or without suffix.

    Raises:
        CheckpointError: a file that cannot be read, is hostile, or holds something else; an image that it has no
            latent for, or two that it has one for.
    """
    value = read_content(path).value
    if isinstance(value, np.ndarray) and value.dtype.hasobject and value.shape == ():
        value = value.item()
    latents: dict[Any, Any]
    if isinstance(value, dict):
        latents = {Path(str(file)).stem: _last(iterations) for file, iterations in value.items()}
        keys: dict[str, Any] = {name: name if name in latents else Path(name).stem for name in names}
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim in (2, 3):
        latents = dict(enumerate(value))
        keys = {name: _first_integer(name) for name in names}
    else:
        held = f"an array {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise CheckpointError(
            f"{path}: holds {held}, not latents: a dict of file names, or an array of numbers [N, L, D] or [N, D]"
        )
    lost = sorted(name for name in names if latents.get(keys[name]) is None)
    shared = sorted(name for name in names if list(keys.values()).count(keys[name]) > 1)
    if lost or shared:
        raise CheckpointError(
            f"{path}: no latent for {lost}, one for several images: {shared}; an image is found by its name, "
            "or by the first integer in it where the file has no names"
        )
    found = {name: torch.from_numpy(np.array(latents[keys[name]], dtype=np.float32)) for name in names}
    broken = sorted(name for name, latent in found.items() if not latent.isfinite().all())
    if broken:
        raise CheckpointError(f"{path}: the latents of {broken} hold NaN or infinite values; invert these images again")
    return found


def _first_integer(name: str) -> int | None:
    digits = re.search(r"\d+", Path(name).stem)
    return int(digits[0]) if digits else None


def _last(iterations: Any) -> np.ndarray | None:
    """The latent of the last iteration; None if the value is not a list of latents."""
    if not (isinstance(iterations, list) or isinstance(iterations, np.ndarray) and iterations.ndim > 0):
        return None
    if len(iterations) == 0:
        return None
    last = iterations[-1]
    return last if isinstance(last, np.ndarray) and last.ndim == 2 and last.dtype.kind == "f" else None


def _read_member(path: Path) -> dict[str, Tensor]:
    value = read_content(path).value
    state = value.get("model_state_dict") if isinstance(value, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        held = f"the keys {', '.join(map(shown, list(value)[:6]))}" if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{path}: no member of a label generator, which has a model_state_dict, but {held}")
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: {shown(broken[0])} holds NaN or infinite values; leave this member out")
    return state


def _middle_rows(size: Size, resolution: Size) -> Rectangle | None:
    """The rows of the image that labels of `size` show, in the generator's pixels; None if they show all of it."""
    height, width = resolution
    if size[0] * width == height * size[1]:
        return None
    rows, rest = divmod(size[0] * width, size[1])
    if rest or rows > height or (height - rows) % 2:
        raise ValueError(
            f"labels of {size[0]} x {size[1]} are not the middle rows of images of {height} x {width}; pass the "
            "generator and the experiment that belong together"
        )
    return Rectangle((height - rows) // 2, 0, (height + rows) // 2, width)
