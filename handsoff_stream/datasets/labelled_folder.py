"""A folder of images, and a folder of masks, paired by the names of their files.

Everything is read and checked once, when the set is opened, and all problems are reported together: an hour
of inversion does not end at image 37. Knows files and ids. Does not know what ids mean.

Shape letters: H W image size.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".bmp", ".npy", ".png", ".tif", ".tiff")  # lossless ones
MASK_MODES = ("1", "I", "I;16", "L", "P")
IGNORE_INDEX = 255
Size = tuple[int, int]


class LabelledImagesError(ValueError):
    """What is wrong with a set of labelled images, all of it; `problems` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{len(problems)} problem(s) with the labelled images:\n  " + "\n  ".join(problems))


class ImageFolder(Dataset[tuple[str, Tensor]]):
    """Images without labels as (name, image), sorted by name; see `LabelledFolder`.

    Raises:
        LabelledImagesError: no image at all; two files of one name; a file that is not an image; an image that is not
            of `size`.
    """

    def __init__(self, images_dir: str | Path, *, size: Size | None = None) -> None:
        problems: list[str] = []
        images = _by_name(Path(images_dir), IMAGE_SUFFIXES, "an image", problems)
        self.names = sorted(images)
        self.files = [images[name] for name in self.names]
        for file in self.files:
            _check_image(file, size, problems)
        _require(bool(images), f"{images_dir}: no image; at least one is needed", problems)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self.names[index], _image_tensor(self.files[index])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return (self[i] for i in range(len(self)))


class LabelledFolder(Dataset[tuple[str, Tensor, Tensor]]):
    """Labelled images as (name, image, mask), sorted by name.

    name: file name without suffix. image: float32 [3, H, W] in [0, 1] on 8-bit levels. mask: int64 [H, W],
    ids.

    Args:
        images_dir: one image a file.
        labels_dir: one mask a file, of the same name up to the suffix: a grey or indexed picture, or an
            `.npy` array of integers [H, W]; the values are the ids, 255 means unlabelled.
        num_classes: ids are below it.
        size: (H, W) that images must have, the generator's resolution; None accepts any.

    Raises:
        LabelledImagesError: no pair at all; an image without mask or a mask without image; two files of one
            name; a file that is not what it should be; a mask of another size than its image; ids that are no
            classes; an image that is not of `size`.
    """

    def __init__(
        self, images_dir: str | Path, labels_dir: str | Path, *, num_classes: int, size: Size | None = None
    ) -> None:
        problems: list[str] = []
        images = _by_name(Path(images_dir), IMAGE_SUFFIXES, "an image", problems)
        masks = _by_name(Path(labels_dir), MASK_SUFFIXES, "a mask", problems)
        problems += [f"{images[n]}: no mask of this name in {labels_dir}" for n in sorted(images.keys() - masks)]
        problems += [f"{masks[n]}: no image of this name in {images_dir}" for n in sorted(masks.keys() - images)]
        self.names = sorted(images.keys() & masks)
        self.files = [(images[name], masks[name]) for name in self.names]
        for image_file, mask_file in self.files:
            image = _check_image(image_file, size, problems)
            _check_mask(mask_file, image, num_classes, problems)
        _require(bool(self.names), f"{images_dir}, {labels_dir}: no labelled image; one is needed", problems)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        image_file, mask_file = self.files[index]
        mask = torch.from_numpy(_read_mask(mask_file).astype(np.int64))
        return self.names[index], _image_tensor(image_file), mask

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))


def _require(any_at_all: bool, otherwise: str, problems: list[str]) -> None:
    """Raise LabelledImagesError if there are problems, or if there is nothing."""
    if problems or not any_at_all:
        raise LabelledImagesError(problems or [otherwise])


def _by_name(folder: Path, suffixes: tuple[str, ...], kind: str, problems: list[str]) -> dict[str, Path]:
    """Name => file of one folder; hidden files are passed over."""
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder")
        return {}
    named: dict[str, Path] = {}
    for file in sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")):
        if file.suffix.lower() not in suffixes:
            problems.append(f"{file}: not {kind} ({', '.join(suffixes)}); move it elsewhere")
        elif file.stem in named:
            problems.append(f"{file}: same name as {named[file.stem].name}; keep one of them")
        else:
            named[file.stem] = file
    return named


def _check_image(file: Path, size: Size | None, problems: list[str]) -> NDArray[np.generic] | None:
    """The image, if it can be read."""
    image = _try(_read_image, file, problems)
    if image is not None and size is not None and image.shape[:2] != tuple(size):
        problems.append(
            f"{file}: {_text(image.shape)} pixels, the generator makes {_text(size)}; crop and resize it, and its "
            "mask, if there is one, by nearest neighbour"
        )
    return image


def _check_mask(file: Path, image: NDArray[np.generic] | None, num_classes: int, problems: list[str]) -> None:
    mask = _try(_read_mask, file, problems)
    if mask is None:
        return
    if image is not None and image.shape[:2] != mask.shape:
        problems.append(f"{file}: {_text(mask.shape)} pixels, its image is {_text(image.shape)}; give them one size")
    ids = np.unique(mask)
    unknown = [int(i) for i in ids if not 0 <= i < num_classes and i != IGNORE_INDEX]
    if unknown:
        problems.append(
            f"{file}: ids {unknown[:8]} are no classes of 0 to {num_classes - 1}, nor {IGNORE_INDEX} for unlabelled"
        )


def _try(read: Callable[[Path], NDArray[np.generic]], file: Path, problems: list[str]) -> NDArray[np.generic] | None:
    try:
        return read(file)
    # PIL raises nearly anything on a damaged file, SyntaxError among others.
    except Exception as error:
        problems.append(f"{file}: cannot be read ({type(error).__name__}: {error})")
        return None


def _image_tensor(file: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(_read_image(file)).permute(2, 0, 1).contiguous().float() / 255


def _read_image(file: Path) -> NDArray[np.uint8]:
    """[H, W, 3]."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).copy()


def _read_mask(file: Path) -> NDArray[np.generic]:
    """[H, W]."""
    if file.suffix.lower() == ".npy":
        # Memory-mapped: a header that promises more than the file holds is an error, not an allocation.
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise ValueError(f"array of {array.dtype} {list(array.shape)}, ids are integers [H, W]")
        return np.array(array)
    with Image.open(file) as picture:
        if picture.mode not in MASK_MODES:
            raise ValueError(f"a picture of mode {picture.mode}, ids are grey or indexed; save ids, not colours")
        return np.asarray(picture).astype(np.int64)


def _text(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
