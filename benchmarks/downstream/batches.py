"""What the arms of `comparison` share, and the labelled images that they can see.

Knows rendered faces, streams, and the network. Does not know which arm sees what, nor how arms are compared.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors

from handsoff_stream.batch import LabelledBatch
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
from handsoff_stream.mixture import mix
from handsoff_stream.precision import fastest_precision
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.tasks import Segmentation

Batches = Iterable[Any]
MOST_LABELLED = 50
"""The first faces of the train split are kept for labelled sets; unlimited annotation starts after so many."""


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
    """Height and width of the images, in pixels."""
    varied: bool
    """Whether the faces are the varied ones, which the checkpoint's generator must then have learned."""
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
    teacher: str
    """File of the weights of a network that had unlimited annotation; written by `teacher.train_teacher`."""
    sampled: str
    """File of a checkpoint fitted on samples; written by `teacher.fit_on_samples`."""

    @property
    def fine(self) -> bool:
        """Whether the labels are the fine classes."""
        return self.class_names == FINE_CLASS_NAMES

    def network(self, seed: int) -> Any:
        """A new network, whose random weights depend on `seed`."""
        return build_deeplab(
            len(self.class_names), backbone=self.backbone, pretrained_backbone=self.pretrained, seed=seed
        )

    def faces(self, split: str, num_images: int) -> RenderedFaces:
        """The first faces of a split, in the experiment's size and classes."""
        return RenderedFaces(split, num_images=num_images, size=self.size, fine=self.fine, varied=self.varied)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """dtype of the forward pass; None: what `train_segmentation` chooses."""
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


def load_teacher(experiment: Experiment) -> nn.Module:
    """The trained teacher in evaluation mode, on the default device."""
    teacher = build_deeplab(len(experiment.class_names), backbone=experiment.backbone)
    teacher.load_state_dict(torch.load(experiment.teacher, map_location="cpu", weights_only=True))
    return teacher.to(resolve_device(None)).eval()


@torch.no_grad()
def labels_of(teacher: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] => int64 [B, H, W], where the images are."""
    device = next(teacher.parameters()).device
    labels: Tensor = teacher(images_BCHW.to(device)).argmax(dim=1)
    return labels.to(images_BCHW.device)


class Relabelled:
    """A joint transform: replaces the label by the teacher's, then applies ordinary augmentation."""

    def __init__(self, experiment: Experiment):
        self.teacher = load_teacher(experiment)
        self.augmentation = ordinary_augmentation(experiment.class_names)

    def __call__(self, image_3HW: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        label_HW = labels_of(self.teacher, image_3HW[None].as_subclass(Tensor))[0]
        relabelled: tuple[Tensor, Tensor] = self.augmentation(image_3HW, tv_tensors.Mask(label_HW))
        return relabelled


def stream_of(
    experiment: Experiment, checkpoint: str, seed: int, batch: int, transforms: Callable[..., Any] | None = None
) -> HandsOffStream[LabelledBatch]:
    """A checkpoint's stream in endless batches; `transforms`: None means ordinary augmentation."""
    return HandsOffStream(
        checkpoint,
        batch_size=batch,
        seed=seed,
        truncation=experiment.truncation,
        precision=fastest_precision(resolve_device(None)),
        transforms=transforms or ordinary_augmentation(experiment.class_names),
    )


def batches_of(stream: HandsOffStream[LabelledBatch]) -> Batches:
    """What a training loop takes from a stream."""
    return DataLoader(stream, batch_size=None)


def stream(experiment: Experiment, seed: int, steps: int) -> Batches:
    """The checkpoint's stream."""
    return batches_of(stream_of(experiment, experiment.checkpoint, seed, experiment.batch))


def sampled(experiment: Experiment, seed: int, steps: int) -> Batches:
    """The stream of the checkpoint that was fitted on samples labelled by the teacher."""
    return batches_of(stream_of(experiment, experiment.sampled, seed, experiment.batch))


def teacher_labelled(experiment: Experiment, seed: int, steps: int) -> Batches:
    """The images of the checkpoint's stream with the teacher's labels."""
    return batches_of(stream_of(experiment, experiment.checkpoint, seed, experiment.batch, Relabelled(experiment)))


def labelled_images(experiment: Experiment) -> RenderedFaces:
    """The labelled images as they are."""
    return labelled_faces(experiment.labelled, size=experiment.size, fine=experiment.fine, varied=experiment.varied)


def labelled(experiment: Experiment, seed: int, steps: int) -> Batches:
    """The labelled images, augmented, for `steps` batches."""
    length, augmentation = steps * experiment.batch, ordinary_augmentation(experiment.class_names)
    repeated = RepeatedAugmented(labelled_images(experiment), length=length, seed=seed, transforms=augmentation)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(repeated, batch_size=experiment.batch, shuffle=True, generator=generator)


def mixed(experiment: Experiment, seed: int, steps: int) -> Batches:
    """Batches whose first half comes from the checkpoint's stream and whose second half from the labelled images."""
    synthetic = stream_of(experiment, experiment.checkpoint, seed, experiment.batch)
    share = Fraction(experiment.batch - experiment.batch // 2, experiment.batch)
    augmentation = ordinary_augmentation(experiment.class_names)
    return batches_of(mix(synthetic, labelled_images(experiment), share, transforms=augmentation))


def unlimited(experiment: Experiment, seed: int, steps: int) -> Batches:
    """Fresh labelled renders for `steps` batches, augmented; no face occurs twice, or with two seeds."""
    num_images = steps * experiment.batch
    first = MOST_LABELLED + seed * num_images
    faces = labelled_faces(first + num_images, size=experiment.size, fine=experiment.fine, varied=experiment.varied)
    repeated = RepeatedAugmented(
        Subset(faces, range(first, first + num_images)),
        length=num_images,
        seed=seed,
        transforms=ordinary_augmentation(experiment.class_names),
        keep=False,
    )
    return DataLoader(repeated, batch_size=experiment.batch)


def fingerprint(checkpoint: str) -> str:
    """The fingerprint of a checkpoint, sha256 in hexadecimal."""
    return str(read_manifest(checkpoint)["fingerprint"])
