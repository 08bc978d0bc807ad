"""Sets of real images, with masks or without: read, mapped to classes, brought to the generator's size.

Everything is read and checked once, when the set is opened, and all problems are reported together, before an
hour of inversion has been spent. Knows how the parts fit together: `listing`, `pictures`, `class_maps`,
`geometry`, `cleanup`. Does not know what is learned from the images.

Shape letters: H W image size, h w label size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap, SourceValue, source_text
from handsoff_stream.datasets.labelled_images.cleanup import erase_small_regions
from handsoff_stream.datasets.labelled_images.geometry import Geometry, same_shape, size_text
from handsoff_stream.datasets.labelled_images.listing import Listing, files_by_name, list_labelled
from handsoff_stream.datasets.labelled_images.pictures import IMAGE_SUFFIXES, RawMask, read_image, read_mask
from handsoff_stream.errors import printable
from handsoff_stream.geometry import Size

__all__ = ["LabelledImages", "LabelledImagesError", "UnlabelledImages", "list_labelled"]

NUM_NAMED = 8  # unmapped values that a message lists
MAX_LINES = 100  # problems that a message lists
Read = TypeVar("Read", NDArray[np.uint8], RawMask)


class LabelledImagesError(ValueError):
    """What is wrong with a set of images, all of it."""

    def __init__(self, problems: list[str], unmapped: Mapping[SourceValue, list[int]] | None = None) -> None:
        self.problems = problems
        """One line each."""
        self.unmapped = dict(unmapped or {})
        """Id or color that the class map does not know => its number of pixels in each mask that has any."""
        lines = [printable(problem) for problem in problems[:MAX_LINES]]
        if len(problems) > MAX_LINES:
            lines.append(f"and {len(problems) - MAX_LINES} more")
        if self.unmapped:
            lines.append(printable(_unmapped_summary(self.unmapped)))
        super().__init__(f"{len(problems)} problem(s) with the labelled images:\n  " + "\n  ".join(lines))


class UnlabelledImages(Dataset[tuple[str, Tensor]]):
    """Images without labels as (name, image), sorted by name; see `LabelledImages`.

    Raises:
        LabelledImagesError: no image at all; two files of one name; a file that is not an image; an image of a size
            that the geometry cannot use.
    """

    def __init__(self, images_dir: str | Path, geometry: Geometry | None = None, *, size: Size | None = None) -> None:
        self.geometry = geometry or Geometry(size)
        problems: list[str] = []
        images = files_by_name(Path(images_dir), IMAGE_SUFFIXES, "an image", problems)
        self.names = sorted(images)
        self.files = [images[name] for name in self.names]
        for file in self.files:
            image = _try(read_image, file, problems)
            problem = None if image is None else self.geometry.problem((image.shape[0], image.shape[1]))
            if problem is not None:
                problems.append(f"{file}: {problem}")
        if not images and not problems:
            problems.append(f"{images_dir}: no image; at least one is needed")
        if problems:
            raise LabelledImagesError(problems)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self.names[index], _tensor(self.geometry.image(read_image(self.files[index])))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return (self[i] for i in range(len(self)))


class LabelledImages(Dataset[tuple[str, Tensor, Tensor]]):
    """Labelled images as (name, image, mask), sorted by name.

    name: unique. image: float32 [3, H, W] in [0, 1] on 8-bit levels. mask: int64 [h, w], class ids, 255
    where unlabelled.

    Args:
        listing: which image goes with which mask; `list_labelled`.
        class_map: what the ids or colors of the masks mean.
        geometry: how images and masks get their size; by default all keep their own.
        smallest_region: connected components of fewer pixels, at label size, become unlabelled. HandsOff: 30; see
            `erase_small_regions`.

    Attributes:
        entries: names and files, in order; `entries[i].latent` may name a file with the image's latent.
        pixels_per_class: labelled pixels of each class in the whole set. A class without any cannot be learned.
        covered: the smallest part of the generator's image that holds every image of the set, whole label pixels; None
            if that is everything, as it is unless the geometry pads.

    Raises:
        LabelledImagesError: all problems of the listing; a file that is not what it should be; a mask of another
            shape than its image; ids or colors without a class; a mask without a labelled pixel; a size that the
            geometry cannot use; a set in which only one class occurs.
    """

    def __init__(
        self, listing: Listing, class_map: ClassMap, geometry: Geometry | None = None, *, smallest_region: int = 0
    ) -> None:
        self.entries, self.class_map, self.geometry = listing.entries, class_map, geometry or Geometry()
        self.smallest_region = smallest_region
        found = _Findings(list(listing.problems), np.zeros(class_map.num_classes, dtype=np.int64))
        for image, label in [*self.files, *listing.unpaired]:
            self._check(image, label, found)
        if not found.problems and (found.pixels > 0).sum() == 1:
            name = class_map.class_names[int(found.pixels.argmax())]
            found.problems.append(f"all labelled pixels are {name}, so there is nothing to learn; check the class map")
        if found.problems:
            raise LabelledImagesError(found.problems, found.unmapped)
        self.pixels_per_class: tuple[int, ...] = tuple(found.pixels.tolist())
        self.covered = self.geometry.covered(found.sizes)

    @property
    def names(self) -> list[str]:
        """Of the images, in order."""
        return [entry.name for entry in self.entries]

    @property
    def files(self) -> list[tuple[Path, Path]]:
        """(image, mask) of each."""
        return [(entry.image, entry.label) for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        entry = self.entries[index]
        image = read_image(entry.image)
        classes, _ = self.class_map.apply(read_mask(entry.label))
        mask = self._finish(classes, (image.shape[0], image.shape[1]))
        return entry.name, _tensor(self.geometry.image(image)), torch.from_numpy(mask.astype(np.int64))

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))

    def _finish(self, classes_HW: NDArray[np.uint8], image: Size) -> NDArray[np.uint8]:
        """Class ids at label size; small connected components become unlabelled."""
        ids_hw = self.geometry.mask(classes_HW, image)
        return erase_small_regions(ids_hw, self.smallest_region, IGNORE_INDEX) if self.smallest_region > 1 else ids_hw

    def _check(self, image_file: Path | None, label_file: Path | None, found: "_Findings") -> None:
        """Read a pair, or what there is of it, as `__getitem__` will."""
        image = _try(read_image, image_file, found.problems)
        size = None if image is None else (image.shape[0], image.shape[1])
        problem = None if size is None else self.geometry.problem(size)
        if problem is not None:
            found.problems.append(f"{image_file}: {problem}")
        elif size is not None:
            found.sizes.add(size)
        mask = _try(read_mask, label_file, found.problems)
        if mask is None:
            return
        if size is not None and not same_shape(size, mask.size):
            problem = f"{size_text(mask.size)} pixels, its image is {size_text(size)}; give them one shape"
            found.problems.append(f"{label_file}: {problem}")
        classes = self._map(mask, label_file, found)
        if classes is None or size is None or problem is not None:
            return
        labelled = self._finish(classes, size)
        labelled = labelled[labelled != IGNORE_INDEX]
        if len(labelled) == 0:
            found.problems.append(f"{label_file}: no labelled pixel; check class map, crop and small regions")
        found.pixels += np.bincount(labelled, minlength=self.class_map.num_classes)

    def _map(self, mask: RawMask, file: Path | None, found: "_Findings") -> NDArray[np.uint8] | None:
        """Class ids, if the class map knows all there is."""
        try:
            classes, unknown = self.class_map.apply(mask)
        except ValueError as error:
            found.problems.append(f"{file}: {error}")
            return None
        if not unknown:
            return classes
        found.problems.append(f"{file}: not in the class map: {_most_frequent(unknown)}")
        for value, pixels in unknown.items():
            found.unmapped.setdefault(value, []).append(pixels)
        return None


@dataclass
class _Findings:
    """What checking a set has found so far; see `LabelledImagesError` and `LabelledImages`."""

    problems: list[str]
    pixels: NDArray[np.int64]
    unmapped: dict[SourceValue, list[int]] = field(default_factory=dict)
    sizes: set[Size] = field(default_factory=set)


def _try(read: Callable[[Path], Read], file: Path | None, problems: list[str]) -> Read | None:
    """What the file holds; None if there is none, or after adding a problem."""
    if file is None:
        return None
    try:
        return read(file)
    # PIL raises nearly anything on a damaged file, SyntaxError among others.
    except Exception as error:
        problems.append(f"{file}: cannot be read ({type(error).__name__}: {error})")
        return None


def _tensor(image_HW3: NDArray[np.uint8]) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(image_HW3).permute(2, 0, 1).contiguous().float() / 255


def _most_frequent(pixels: Mapping[SourceValue, int]) -> str:
    """The first few of some ids or colors, and how many more there are."""
    named = [f"{source_text(value)} ({count} pixels)" for value, count in list(pixels.items())[:NUM_NAMED]]
    more = len(pixels) - len(named)
    return ", ".join(named) + (f" and {more} more, as smoothed or lossy pictures have" if more else "")


def _unmapped_summary(unmapped: Mapping[SourceValue, list[int]]) -> str:
    """Values without a class in the whole set, most frequent first, and the way out."""
    order = sorted(unmapped, key=lambda value: -sum(unmapped[value]))
    named = [f"{source_text(v)} ({sum(unmapped[v])} pixels, masks: {len(unmapped[v])})" for v in order[:NUM_NAMED]]
    more = f" and {len(order) - len(named)} more" if len(order) > len(named) else ""
    return f"not in the class map, in all: {', '.join(named)}{more}; add them to a class, to ignore, or set others"
