"""What the arms of `comparison` share, and the labelled images that they can see.

Knows rendered faces, streams, and the network. Does not know which arm sees what, nor how arms are compared.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors

from handsoff_stream.checkpoint import load_checkpoint, read_manifest
from handsoff_stream.datasets.rendered_faces import (
    CLASS_NAMES,
    FINE_CLASS_NAMES,
    RenderedFaces,
    labelled_faces,
)
from handsoff_stream.device import resolve_device
from handsoff_stream.downstream import (
    RepeatedAugmented,
    build_deeplab,
    ordinary_augmentation,
)
from handsoff_stream.precision import fastest_precision
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.tasks import Segmentation

Batches = Iterable[Any]
MOST_LABELLED = 50
"""Faces of the train split that are kept for labelled sets; unlimited annotation starts behind them."""


@dataclass(frozen=True)
class Experiment:
    """What all arms of a comparison share."""

    checkpoint: str
    truncation: float | None
    """psi of the stream; None: the checkpoint's."""
    class_names: tuple[str, ...]
    labelled: int
    """Labelled images, at most `MOST_LABELLED`."""
    size: int
    """Pixels a side."""
    varied: bool
    """Of the varied faces, which the checkpoint's generator must have learnt."""
    backbone: str
    pretrained: bool
    steps: int
    batch: int
    lr: float
    schedule: str
    warmup: int
    dtype: str | None
    test_images: int
    validation_images: int
    curve: tuple[int, ...]
    """Steps after which the validation renders are scored."""
    judge: str
    """File of the weights of a network that had unlimited annotation; written by `downstream_judge.train_judge`."""
    sampled: str
    """File of a checkpoint fitted on samples; written by `downstream_judge.fit_on_samples`."""

    @property
    def fine(self) -> bool:
        return self.class_names == FINE_CLASS_NAMES

    def network(self, seed: int) -> Any:
        return build_deeplab(
            len(self.class_names), backbone=self.backbone, pretrained_backbone=self.pretrained, seed=seed
        )

    def faces(self, split: str, num_images: int) -> RenderedFaces:
        return RenderedFaces(split, num_images=num_images, size=self.size, fine=self.fine, varied=self.varied)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)


def class_names_of(checkpoint: str) -> tuple[str, ...]:
    """The rendered faces' class set that a checkpoint was fitted on.

    Raises:
        ValueError: the checkpoint labels anything else.
    """
    for head in load_checkpoint(checkpoint).heads.values():
        if isinstance(head.task, Segmentation) and head.task.class_names in (CLASS_NAMES, FINE_CLASS_NAMES):
            return head.task.class_names
    raise ValueError(
        f"{checkpoint} labels neither the {len(CLASS_NAMES)} nor the {len(FINE_CLASS_NAMES)} classes of the rendered "
        "faces, so its stream has no test images here; pass a checkpoint of that domain"
    )


# Batches -------------------------------------------------------------------------------------------------------------


def load_judge(experiment: Experiment) -> nn.Module:
    judge = build_deeplab(len(experiment.class_names), backbone=experiment.backbone)
    judge.load_state_dict(torch.load(experiment.judge, map_location="cpu", weights_only=True))
    return judge.to(resolve_device(None)).eval()


@torch.no_grad()
def labels_of(judge: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] => int64 [B, H, W], where the images are."""
    device = next(judge.parameters()).device
    labels: Tensor = judge(images_BCHW.to(device)).argmax(dim=1)
    return labels.to(images_BCHW.device)


class Relabelled:
    """A joint transform: the label is the judge's, then ordinary augmentation."""

    def __init__(self, experiment: Experiment):
        self.judge = load_judge(experiment)
        self.augmentation = ordinary_augmentation(experiment.class_names)

    def __call__(self, image_3HW: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        label_HW = labels_of(self.judge, image_3HW[None].as_subclass(Tensor))[0]
        relabelled: tuple[Tensor, Tensor] = self.augmentation(image_3HW, tv_tensors.Mask(label_HW))
        return relabelled


def stream_of(
    experiment: Experiment, checkpoint: str, seed: int, batch: int, transforms: Callable[..., Any] | None = None
) -> Batches:
    stream = HandsOffStream(
        checkpoint,
        batch_size=batch,
        seed=seed,
        truncation=experiment.truncation,
        precision=fastest_precision(resolve_device(None)),
        transforms=transforms or ordinary_augmentation(experiment.class_names),
    )
    return DataLoader(stream, batch_size=None)


def stream(experiment: Experiment, seed: int, steps: int) -> Batches:
    return stream_of(experiment, experiment.checkpoint, seed, experiment.batch)


def sampled(experiment: Experiment, seed: int, steps: int) -> Batches:
    return stream_of(experiment, experiment.sampled, seed, experiment.batch)


def judged(experiment: Experiment, seed: int, steps: int) -> Batches:
    return stream_of(experiment, experiment.checkpoint, seed, experiment.batch, Relabelled(experiment))


def labelled(experiment: Experiment, seed: int, steps: int, *, batch: int | None = None) -> Batches:
    batch = batch or experiment.batch
    faces = labelled_faces(experiment.labelled, size=experiment.size, fine=experiment.fine, varied=experiment.varied)
    augmentation = ordinary_augmentation(experiment.class_names)
    views = RepeatedAugmented(faces, length=steps * batch, seed=seed, transforms=augmentation)
    return DataLoader(views, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(seed))


def mixed(experiment: Experiment, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    half = experiment.batch // 2
    synthetic = stream_of(experiment, experiment.checkpoint, seed, half)
    real = labelled(experiment, seed, steps, batch=experiment.batch - half)
    for (images, labels), (more_images, more_labels) in zip(synthetic, real, strict=False):
        yield torch.cat([images, more_images]), torch.cat([labels, more_labels])


def unlimited(experiment: Experiment, seed: int, steps: int) -> Batches:
    num_images = steps * experiment.batch
    first = MOST_LABELLED + seed * num_images
    faces = labelled_faces(first + num_images, size=experiment.size, fine=experiment.fine, varied=experiment.varied)
    views = RepeatedAugmented(
        Subset(faces, range(first, first + num_images)),
        length=num_images,
        seed=seed,
        transforms=ordinary_augmentation(experiment.class_names),
        keep=False,
    )
    return DataLoader(views, batch_size=experiment.batch)


def fingerprint(checkpoint: str) -> str:
    """Of the checkpoint that was streamed from."""
    return str(read_manifest(checkpoint)["fingerprint"])
