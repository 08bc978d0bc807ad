"""Images to train a generator on (rendered faces, a folder of files, or one array), and an endless random order.

All datasets yield uint8 [3, H, W]. Knows no network.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from handsoff_stream.datasets.labelled_images.pictures import read_image
from handsoff_stream.datasets.rendered_faces import RenderedFaces

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
RENDERED_IMAGES = 1_000_000


class ImageArray(Dataset[Tensor]):
    """Images uint8 [N, 3, H, W] in a `.npy` file, memory-mapped.

    Raises:
        ValueError: an array of another shape or dtype.
    """

    def __init__(self, path: Path):
        self.images = np.load(path, mmap_mode="r", allow_pickle=False)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"{path}: {self.images.dtype} {self.images.shape} are not images; save uint8 [N, 3, H, W]")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[index]))


class ImageFolder(Dataset[Tensor]):
    """All images below a folder, center-cropped to squares and resized to `resolution`.

    Raises:
        ValueError: no image below the folder.
    """

    def __init__(self, folder: Path, resolution: int):
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise ValueError(
                f"{folder}: no images below this folder; pass one with {', '.join(sorted(IMAGE_SUFFIXES))} files"
            )
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(read_image(self.paths[index]))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        resized = image.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


class Renders(Dataset[Tensor]):
    """The split of the rendered faces that generators are trained on; `rare`: probability of glasses, and of a hat."""

    def __init__(self, resolution: int, rare: float, varied: bool):
        self.faces = RenderedFaces(
            "generator", num_images=RENDERED_IMAGES, size=resolution, glasses=rare, hat=rare, varied=varied
        )

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> Tensor:
        return (self.faces[index][0] * 255).round().to(torch.uint8)


class RandomOrder(Sampler[int]):
    """Endless random indices; draw k depends on (seed, k) alone, so a run resumed at `start` gets the same draws.

    Process `rank` of `world` gets every `world`-th draw.
    """

    BLOCK = 4096

    def __init__(self, num_items: int, seed: int, start: int, *, rank: int = 0, world: int = 1):
        self.num_items, self.seed, self.position, self.world = num_items, seed, start + rank, world

    def __iter__(self) -> Iterator[int]:
        while True:
            block, offset = divmod(self.position, self.BLOCK)
            rng = np.random.default_rng([self.seed, block])
            for index in rng.integers(self.num_items, size=self.BLOCK)[offset :: self.world]:
                self.position += self.world
                yield int(index)


def open_data(data: str | None, resolution: int, *, rare: float, varied: bool) -> Dataset[Tensor]:
    """Rendered faces (see `Renders`) if `data` is None, else a `.npy` array (of any resolution) or a folder.

    Raises:
        ValueError: as `ImageArray` and `ImageFolder`.
    """
    if data is None:
        return Renders(resolution, rare, varied)
    path = Path(data)
    return ImageArray(path) if path.suffix == ".npy" else ImageFolder(path, resolution)
