"""Labels of every image by learners that did not see it, one fold after the other, kept on disk as they come.

A result carries the SHA-256 of everything that it depends on. A run that was interrupted reads the finished results and
ends with the same labels; a result that depends on anything else is computed again. Knows folds and files. Does not
know how labels are made (`learners`), or what is compared.

Shape letters: N images, E images of a fold, K classes, h w label size.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handsoff_stream.checking.folds import nested_half, stratified_folds
from handsoff_stream.checking.learners import (
    Material,
    label_generator_labels,
    network_labels,
)
from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.tensors import read_tensors, write_tensors
from handsoff_stream.fitting.fit import FitSettings
from handsoff_stream.fitting.teacher import TeacherSettings
from handsoff_stream.progress import progress_bar
from handsoff_stream.provenance import versions

MANIFEST_KEY = "handsoff_stream_check"
Labels = NDArray[np.uint8]
"""uint8 [N, h, w], class ids."""


@dataclass(frozen=True)
class HeldOutLabels:
    """Labels of all images, each by learners that were trained without it."""

    folds: tuple[tuple[int, ...], ...]
    """Positions of the images that were held out together."""
    halves: tuple[tuple[int, ...], ...]
    """For each fold the half of the other images that `labels_half` was fitted to."""
    labels: Labels
    """By the label generator."""
    labels_half: Labels
    """By a label generator that was fitted to half as many images."""
    network: Labels | None
    """By the segmentation network, of the real images; None without one."""
    network_on_reconstruction: Labels | None
    """By the same network, of the reconstructions."""


def label_held_out(
    material: Material,
    shown_NK: NDArray[np.bool_],
    folder: Path,
    *,
    num_folds: int,
    fit: FitSettings,
    network: TeacherSettings | None,
    seed: int,
    progress: bool = False,
) -> HeldOutLabels:
    """Hold out one fold after the other, and label it by what is learned from the others.

    Args:
        material: all images.
        shown_NK: whether each image shows each class.
        folder: receives one file for each result; created if missing.
        num_folds: from 2 to N.
        fit: of the label generators.
        network: of the segmentation network; None for none.
        seed: of the folds and the network.
        progress: show a bar.

    Raises:
        ValueError: a number of folds out of its range.
        OutputError: a result cannot be written.
    """
    folds = stratified_folds(shown_NK, num_folds, seed)
    halves = [nested_half(_others(fold, folds), shown_NK, seed) for fold in folds]
    folder.mkdir(parents=True, exist_ok=True)
    store = _Store(folder, material)
    jobs = list(_jobs(material, folds, halves, folder, fit, network, seed))
    parts: list[dict[str, Tensor]] = [{} for _ in folds]
    with progress_bar("Checking", len(jobs), show=progress) as update:
        for done, job in enumerate(jobs):
            update(done, f"fold {job.fold + 1} of {num_folds}: {job.note}")
            parts[job.fold] |= store.get(job)
        update(len(jobs), "")
    return _together(folds, halves, parts)


@dataclass(frozen=True)
class _Job:
    """One result: what it is called, what it depends on, and how it is computed."""

    fold: int
    note: str
    """What is being done, for a progress bar."""
    names: tuple[str, ...]
    """Of the tensors of the result, each uint8 [E, h, w]."""
    held_out: Sequence[int]
    depends_on: Mapping[str, Any]
    """JSON-able."""
    compute: Callable[[], tuple[Tensor, ...]]


def _jobs(
    material: Material,
    folds: Sequence[Sequence[int]],
    halves: Sequence[Sequence[int]],
    folder: Path,
    fit: FitSettings,
    network: TeacherSettings | None,
    seed: int,
) -> Iterator[_Job]:
    for f, (fold, half) in enumerate(zip(folds, halves, strict=True)):
        train = _others(fold, folds)
        for name, note, images in (
            ("labels", "label generator", train),
            ("labels_half", "label generator, half of the images", half),
        ):
            about: dict[str, Any] = {"held_out": fold, "train": images, "fit": fit.config()}
            compute = partial(_labels, material, images, fold, fit, folder)
            yield _Job(f, note, (name,), fold, about, compute)
        if network is not None:
            about = {"held_out": fold, "train": train, "network": asdict(network), "seed": seed}
            names = ("network", "network_on_reconstruction")
            run = partial(network_labels, material, train, fold, network, seed)
            yield _Job(f, "segmentation network", names, fold, about, run)


def _labels(
    material: Material, train: Sequence[int], held_out: Sequence[int], fit: FitSettings, folder: Path
) -> tuple[Tensor, ...]:
    return (label_generator_labels(material, train, held_out, fit, folder),)


def _others(fold: Sequence[int], folds: Sequence[Sequence[int]]) -> list[int]:
    return sorted(i for other in folds if other is not fold for i in other)


def _together(
    folds: Sequence[Sequence[int]], halves: Sequence[Sequence[int]], parts: Sequence[Mapping[str, Tensor]]
) -> HeldOutLabels:
    order = torch.tensor([i for fold in folds for i in fold])
    position = torch.argsort(order)

    def of_all(name: str) -> Labels:
        return torch.cat([part[name] for part in parts])[position].numpy()

    has_network = "network" in parts[0]
    return HeldOutLabels(
        folds=tuple(tuple(fold) for fold in folds),
        halves=tuple(tuple(half) for half in halves),
        labels=of_all("labels"),
        labels_half=of_all("labels_half"),
        network=of_all("network") if has_network else None,
        network_on_reconstruction=of_all("network_on_reconstruction") if has_network else None,
    )


class _Store:
    """Results of the folds in a folder, each with the fingerprint of what it depends on."""

    def __init__(self, folder: Path, material: Material) -> None:
        self.folder, self.material = folder, material
        digest = hashlib.sha256()
        for tensor in (material.images, material.masks, material.w_plus, material.reconstructions):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        self.common = {
            "generator": Checkpoint(material.generator).manifest()["fingerprint"],
            "device": material.generator.w_avg.device.type,
            "class_names": list(material.task.class_names),
            "tensors": digest.hexdigest(),
            "versions": versions(),
        }

    def get(self, job: _Job) -> dict[str, Tensor]:
        """The job's result: read if it was made from the same things, otherwise computed and written."""
        path = self.folder / f"fold-{job.fold}.{job.names[0]}.safetensors"
        depends_on = json.dumps({**self.common, **job.depends_on}, sort_keys=True)
        inputs = hashlib.sha256(depends_on.encode()).hexdigest()
        found = self._read(path, job, inputs)
        if found is None:
            found = dict(zip(job.names, job.compute(), strict=True))
            write_tensors(path, found, key=MANIFEST_KEY, manifest={"inputs": inputs})
        return found

    def _read(self, path: Path, job: _Job, inputs: str) -> dict[str, Tensor] | None:
        """None if the file is missing, damaged, or made from other things."""
        if not path.is_file():
            return None
        try:
            manifest, found = read_tensors(path, MANIFEST_KEY)
        except CheckpointError:
            return None
        shape, num_classes = (len(job.held_out), *self.material.label_size), self.material.task.num_classes
        usable = sorted(found) == sorted(job.names) and all(
            labels.dtype == torch.uint8 and tuple(labels.shape) == shape and int(labels.max()) < num_classes
            for labels in found.values()
        )
        return found if usable and manifest.get("inputs") == inputs else None
