"""Labelled images that go with the samples of a stream: which ones, and how they look, as functions of the index.

With the share s of labelled images, r = s / (1 - s) of them go with each sample. The images come in random orders of
the whole set, one after the other; the sample of index i takes the places floor(i r), floor(i r) + 1, ... of that
sequence. So neither ranks, workers, the order of samples, nor what was rejected changes which images go with a sample.
Knows indices, datasets and transforms. Does not know streams, positions or files.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor
from typing import Any, Protocol

import torch
from torch import Tensor

from handsoff_stream.batch import ONLY_HEAD, LabelledBatch
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.isolation import isolated
from handsoff_stream.seeding import MAX_INDEX, Stream, permutation
from handsoff_stream.transforms import JointTransform

MOST_HASHED = 64  # labelled images
MOST_KEPT = 2**30  # bytes of labelled images, in each process

ClassNames = Mapping[str, Sequence[str]]
"""By head, as a stream's labels have them; empty for a head whose labels are numbers."""


class MapStyle(Protocol):
    """A dataset with a length; see `LabelledSet`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class LabelledSet:
    """A user's labelled images in the form of a stream's samples: checked, and kept in memory once they were read.

    `labelled_set[n]` is a batch of image n alone, on the CPU, packed to bytes.

    Args:
        labelled: a dataset of samples whose last two entries are image and label, the same at every call. image:
            float32 [3, H, W] in [0, 1], rounded to 8-bit levels, or uint8 [3, H, W]. label: integers [H, W], class ids
            or 255 where unlabelled; float [K, H, W] for heads without classes; a dict by head if there are several.
        size: height and width of the stream's images.
        class_names: of the stream's heads.

    Raises:
        TypeError: `labelled` has no length, or its samples are not image and label.
        ValueError: an empty set; images or labels that are not what is said above. The first 64 images, or 64 of more
            at equal distances, are read and checked at once, the others when they are needed.
    """

    def __init__(self, labelled: MapStyle, size: tuple[int, int], class_names: ClassNames) -> None:
        if not (hasattr(labelled, "__len__") and hasattr(labelled, "__getitem__")):
            raise TypeError(
                f"labelled={type(labelled).__name__} cannot be asked for its length or its samples by number, and "
                "shuffled orders need both; pass a map-style dataset, or a list of (image, label)"
            )
        if len(labelled) == 0:
            raise ValueError("labelled is empty, so there is nothing to mix the stream with; pass at least one image")
        self._labelled, self._size, self._class_names = labelled, size, class_names
        self._kept: dict[int, LabelledBatch] = {}
        self._bytes_left = MOST_KEPT
        self.fingerprint = self._fingerprint()
        """Number of images, and the hash of at most `MOST_HASHED` of them."""

    def __len__(self) -> int:
        return len(self._labelled)

    def __getitem__(self, number: int) -> LabelledBatch:
        if number in self._kept:
            return self._kept[number].map(torch.clone)
        with isolated():
            one = self._read(number)
        size = sum(tensor.nbytes for tensor in one.tensors())
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._kept[number] = one.map(torch.clone)
        return one

    def _read(self, number: int) -> LabelledBatch:
        sample = self._labelled[number]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise TypeError(
                f"labelled[{number}] is of type {type(sample).__name__}, and an image and its label are needed; let "
                "the dataset return (image, label)"
            )
        image, label = sample[-2:]
        self._check_image(image, number)
        labels: Any = {name: self._checked(head, name, number) for name, head in self._by_head(label, number).items()}
        return LabelledBatch(
            images=image[None],
            labels=labels if isinstance(label, dict) else labels[ONLY_HEAD],
            uncertainty=torch.zeros(1),
            indices=torch.tensor([-1 - number]),
            next_index=0,
        ).packed()

    def _check_image(self, image: Any, number: int) -> None:
        if not isinstance(image, Tensor) or image.dtype not in (torch.float32, torch.uint8):
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(
                f"the image of labelled[{number}] is {kind}, and the stream's are tensors in [0, 1]; convert it with "
                "torchvision's v2.functional.to_image and to_dtype(..., torch.float32, scale=True)"
            )
        height, width = self._size
        if image.shape != (3, height, width):
            raise ValueError(
                f"the image of labelled[{number}] is {list(image.shape)}, the stream's are [3, {height}, {width}], and "
                f"a batch has one size; resize it, for instance with Geometry(({height}, {width}), resize='crop') of "
                "handsoff_stream.datasets.labelled_images"
            )
        if image.dtype == torch.float32 and not (0 <= image.min() and image.max() <= 1):
            raise ValueError(
                f"the image of labelled[{number}] has values from {image.min():.3g} to {image.max():.3g}, the stream's "
                "are in [0, 1]; leave normalization to the training loop, where it meets both"
            )

    def _by_head(self, label: Any, number: int) -> dict[str, Any]:
        given = label if isinstance(label, dict) else {ONLY_HEAD: label}
        if given.keys() != self._class_names.keys():
            wanted = ", ".join(self._class_names) if ONLY_HEAD not in self._class_names else "one tensor"
            came = ", ".join(map(str, given)) if isinstance(label, dict) else "one tensor"
            raise ValueError(
                f"the label of labelled[{number}] is {came}, the stream's labels are {wanted}; give every labelled "
                "image what the heads of the checkpoint give a sample"
            )
        return {name: given[name] for name in self._class_names}

    def _checked(self, label: Any, head: str, number: int) -> Tensor:
        """The label as int64 or float32, with an axis for the batch."""
        names, size = self._class_names[head], list(self._size)
        where = f"the label of labelled[{number}]" + (f" for {head}" if head else "")
        floating = isinstance(label, Tensor) and label.is_floating_point()
        if not isinstance(label, Tensor) or floating == bool(names):
            kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
            wanted = f"the ids of {len(names)} classes" if names else "numbers"
            raise TypeError(f"{where} is {kind}, the stream's are {wanted}; pass a tensor of that kind")
        if list(label.shape[-2:]) != size or label.ndim != (2 if names else 3):
            shape = [*([] if names else ["K"]), *size]
            raise ValueError(
                f"{where} is {list(label.shape)}, the stream's are [{', '.join(map(str, shape))}], one for each pixel "
                "of the image; resize it without interpolation between ids"
            )
        if not names:
            return label.to(torch.float32)[None]
        ids = label.long()[None]
        wrong = ids[(ids < 0) | ((ids >= len(names)) & (ids != IGNORE_INDEX))]
        if len(wrong):
            raise ValueError(
                f"{where} has the id {int(wrong[0])}, the stream has the classes 0 to {len(names) - 1}, and "
                f"{IGNORE_INDEX} marks unlabelled pixels; use the class map that the checkpoint was fitted with"
            )
        return ids

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        count = len(self)
        for place in range(min(count, MOST_HASHED)):
            one = self[place * count // min(count, MOST_HASHED)]
            for tensor in one.tensors():
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return f"{count} images, sha256 {digest.hexdigest()[:16]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_bytes_left": MOST_KEPT}  # a spawned process reads them itself


class Companions:
    """The labelled images that go with each sample of a stream.

    Args:
        labelled: where they come from.
        share: of labelled images in all that is handed out, in (0, 1).
        seed: of the stream.
        transforms: of image and label, see `JointTransform`; None for none.
        image_dtype: of the stream's images.
        device: where the stream's samples lie.
    """

    def __init__(
        self,
        labelled: LabelledSet,
        share: Fraction,
        *,
        seed: int,
        transforms: Callable[..., Any] | None,
        image_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._labelled, self._seed, self._device = labelled, seed, device
        self._transform = None if transforms is None else JointTransform(transforms, seed, Stream.LABELLED_TRANSFORM)
        self._as_float = image_dtype != torch.uint8
        self.share = share
        self.ratio = share / (1 - share)
        """Labelled images per sample."""

    def count(self, place: int) -> int:
        """How many go with the sample at a place of a sequence, so that its first n samples have floor(n r)."""
        return floor((place + 1) * self.ratio) - floor(place * self.ratio)

    def of_batch(self, indices: Sequence[int]) -> list[LabelledBatch]:
        """What goes with the samples of one batch, each a batch of one."""
        return [self.one(index, k) for place, index in enumerate(indices) for k in range(self.count(place))]

    def one(self, index: int, number: int) -> LabelledBatch:
        """Labelled image `number`, from 0, of those that go with sample `index`, as a batch of one.

        Its index is -1 - n for image n of the set, and its uncertainty is 0.
        """
        order, place = divmod(floor(index * self.ratio) + number, len(self._labelled))
        chosen = permutation(self._seed, order % MAX_INDEX, len(self._labelled))[place]
        with isolated():
            one = self._labelled[chosen].to(self._device, non_blocking=True).unpacked(images_too=self._as_float)
            if self._transform is None:
                return one
            own = (index * ceil(self.ratio) + number) % MAX_INDEX  # no other labelled image of the stream has it
            return replace(self._transform(replace(one, indices=torch.tensor([own]))), indices=one.indices)

    def identity(self) -> dict[str, Any]:
        """What a saved state must share, JSON-able."""
        return {"share": str(self.share), "labelled": self._labelled.fingerprint}

    def __repr__(self) -> str:
        return f"Companions({len(self._labelled)} labelled images, share={self.share})"


def check_same_size(samples: LabelledBatch, companions: Sequence[LabelledBatch]) -> None:
    """Refuse labelled images that fit into no batch with these samples.

    Raises:
        ValueError: images or labels of another shape; their sizes were the same before the transforms.
    """
    for one in companions:
        for mine, other in zip(one.tensors(), samples.tensors(), strict=True):
            if mine.shape[1:] != other.shape[1:]:
                raise ValueError(
                    f"labelled image {-1 - int(one.indices[0])} has the shape {list(mine.shape[1:])} where a sample "
                    f"of the stream has {list(other.shape[1:])}, and a batch has one; pass transforms that give both "
                    "the same size, to `mix` and to the stream"
                )
