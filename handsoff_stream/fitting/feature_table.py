"""Feature maps of all inverted images, and the hypercolumns of a few of their pixels at a time.

Maps are kept at native resolution in float16, one table of rows per resolution: 3 MB per image at 128 x 128,
0.16 GB at 1024 x 1024 with labels of 512 x 512, where its hypercolumns take 6.4 GB. A pixel's row is four weighted
rows of every table. Coarse tables stay in memory as long as they fit a budget. The others lie in temporary files
without a name, which the operating system caches and which disappear with the process.

Knows generators, pyramids and where rows are kept. Does not know labels. Sampling is that of `features`, up to
rounding to float16; where rows are kept does not change their bits.

Shape letters: N images, P pixels, C feature channels, L number of style inputs, D latent size, H W label
size, h w native size.
"""

import mmap
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.features import bilinear_taps
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Size

GIGABYTE = 10**9
MEMORY_GB_CPU = 1.2  # with a 1024 x 1024 generator and the widest published ensemble, the process stays below 8 GB
MEMORY_GB_ACCELERATOR = 10.0  # 50 images with labels of 512 x 512 take 8.1; with both networks that is below 16 GB


class MemoryRows:
    """float16 rows [N * h * w, C] in the memory of a device."""

    def __init__(self, num_rows: int, channels: int, device: torch.device) -> None:
        self.device = device
        self._rows = torch.empty(num_rows, channels, dtype=torch.float16, device=device)
        self._filled = 0
        self.num_bytes = self._rows.nbytes

    def append(self, rows: Tensor) -> None:
        """Add float16 rows [n, C] after those added so far."""
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def open(self) -> Tensor:
        """All rows, to be read only."""
        return self._rows


class FileRows:
    """float16 rows [N * h * w, C] in a file that has no name, on the CPU's side."""

    device = torch.device("cpu")

    def __init__(self, num_rows: int, channels: int, folder: Path) -> None:
        self.channels, self.num_bytes = channels, 2 * num_rows * channels
        self._file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self._file.close)

    def append(self, rows: Tensor) -> None:
        """Add float16 rows [n, C] after those added so far."""
        self._file.write(rows.cpu().contiguous().numpy().data)
        self._file.flush()

    def open(self) -> Tensor:
        """All rows, to be read only."""
        # Mapped afresh for each use: pages that were read would otherwise add up to the whole file in this process.
        mapped = mmap.mmap(self._file.fileno(), 0)
        if hasattr(mmap, "MADV_RANDOM"):  # where the file is not cached, read the rows that are asked for and no more
            mapped.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(mapped, dtype=torch.float16).view(-1, self.channels)


class SameSizeMaps(NamedTuple):
    """All maps of one native size."""

    size: Size
    rows: MemoryRows | FileRows


class FeatureTable:
    """Rows of hypercolumns of N images at one label size; `collect` makes one.

    Args:
        groups: in hypercolumn order, of N images each; several consecutive maps may share a group.
        num_images: N.
        size: (H, W) of the labels.
        feature_channels: channels of each map of the generator's pyramids.
        device: where rows are handed out.
    """

    def __init__(
        self,
        groups: Sequence[SameSizeMaps],
        num_images: int,
        size: Size,
        feature_channels: Sequence[int],
        device: torch.device,
    ) -> None:
        self.num_images, self.size, self.feature_channels = num_images, size, tuple(feature_channels)
        self.device = device
        self._groups = tuple(groups)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of features that are kept in the memory of `device`."""
        return sum(group.rows.num_bytes for group in self._groups if isinstance(group.rows, MemoryRows))

    @property
    def bytes_in_files(self) -> int:
        """Bytes of features that lie in temporary files because they did not fit into memory."""
        return sum(group.rows.num_bytes for group in self._groups if isinstance(group.rows, FileRows))

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        generator: Generator,
        w_plus_NLD: Tensor,
        size: Size | None = None,
        *,
        memory_gb: float | None = None,
        cache_dir: str | Path | None = None,
    ) -> "FeatureTable":
        """Run the generator on all latents, one image at a time: no more than one pyramid exists at once.

        Neighboring maps of one resolution share a group. Maps finer than the labels are reduced to their size
        (HandsOff, section 3.2, caps at 512 x 512): hypercolumns take nothing else from them.

        Args:
            generator: its device does the work, now and when rows are asked for.
            w_plus_NLD: float32 [N, L, D], N >= 1.
            size: (H, W) of the labels; by default the generator's resolution.
            memory_gb: gigabytes (10^9 bytes) of features to keep in the memory of that device, coarse maps first; the
                rest goes to files. Default: 1.2 on a CPU, 10 elsewhere. On a CPU all choices give the same bits;
                rows that an accelerator mixes may differ from those of a file in float16's last place.
            cache_dir: folder of these files; by default that of the system's temporary files. It should be on a disk:
                where temporary files lie in memory, nothing is gained.

        Raises:
            ValueError: no latent, or a negative budget.
            OSError: the folder cannot be written, or has too little space.
        """
        device = generator.w_avg.device
        if len(w_plus_NLD) == 0 or (memory_gb is not None and not memory_gb >= 0):
            raise ValueError(
                f"{len(w_plus_NLD)} latents and memory_gb={memory_gb} make no table of features; "
                "pass at least one latent, and a budget of 0 or more gigabytes"
            )
        if memory_gb is None:
            memory_gb = MEMORY_GB_CPU if device.type == "cpu" else MEMORY_GB_ACCELERATOR
        folder = Path(tempfile.gettempdir() if cache_dir is None else cache_dir)
        size = size or generator.resolution
        groups: list[SameSizeMaps] = []
        for w_plus_1LD in w_plus_NLD.to(device).split(1):
            maps = [_capped(m, size) for m in generator.synthesis(w_plus_1LD, "const").features.maps]
            same_size = [list(same) for _, same in groupby(maps, key=lambda map_1Chw: map_1Chw.shape[2:])]
            groups = groups or list(_allocate(same_size, len(w_plus_NLD), memory_gb, folder))
            for group, same in zip(groups, same_size, strict=True):
                group.rows.append(torch.cat([m[0].half() for m in same]).flatten(1).t())
        return cls(groups, len(w_plus_NLD), size, generator.feature_channels, device)

    def rows(self, pixels_P: Tensor) -> Tensor:
        """Hypercolumns float32 [P, C] of pixels, by their flat int64 index into [N, H, W]."""
        pixels = {device: pixels_P.to(device) for device in {group.rows.device for group in self._groups}}
        mixed = [self._mixed(group, pixels[group.rows.device]) for group in self._groups]
        return torch.cat([rows.to(self.device).float() for rows in mixed], dim=1)

    def _mixed(self, group: SameSizeMaps, pixels_P: Tensor) -> Tensor:
        """float16 [P, C_group]."""
        if group.size == self.size:
            return group.rows.open()[pixels_P]
        (native_h, native_w), (height, width), device = group.size, self.size, pixels_P.device
        image_P, y_P, x_P = pixels_P // (height * width), pixels_P // width % height, pixels_P % width
        y = bilinear_taps(native_h, height, 0, height, device)
        x = bilinear_taps(native_w, width, 0, width, device)
        row_P2 = image_P[:, None] * native_h + torch.stack([y.low[y_P], y.high[y_P]], dim=1)
        column_P2 = torch.stack([x.low[x_P], x.high[x_P]], dim=1)
        index_P4 = (row_P2[:, :, None] * native_w + column_P2[:, None, :]).flatten(1)
        weight_P4 = (_pair(y.weight[y_P])[:, :, None] * _pair(x.weight[x_P])[:, None, :]).flatten(1)
        return F.embedding_bag(index_P4, group.rows.open(), per_sample_weights=weight_P4.half(), mode="sum")


def keep_in_memory(needed: Sequence[int], memory_gb: float) -> list[bool]:
    """Whether each group of maps stays in memory: from the first on, as many as fit into the budget together.

    Args:
        needed: bytes of each group.
        memory_gb: the budget in gigabytes (10^9 bytes).
    """
    return [total <= memory_gb * GIGABYTE for total in accumulate(needed)]


def _allocate(
    same_size: Sequence[Sequence[Tensor]], num_images: int, memory_gb: float, folder: Path
) -> Iterator[SameSizeMaps]:
    """One group for each group of maps [1, C, h, w] of one size: in memory while the sum fits, then in files."""
    needed = [2 * num_images * sum(map_1Chw.numel() for map_1Chw in same) for same in same_size]
    in_memory = keep_in_memory(needed, memory_gb)
    on_disk = sum(size for size, kept in zip(needed, in_memory, strict=True) if not kept)
    free = shutil.disk_usage(folder).free
    if on_disk > free:
        raise OSError(
            f"the features of {num_images} images need {on_disk / GIGABYTE:.1f} GB in {folder}, which has "
            f"{free / GIGABYTE:.1f} GB free; pass another cache_dir, or a memory_gb above {memory_gb:g}"
        )
    for same, kept in zip(same_size, in_memory, strict=True):
        channels, (height, width) = sum(map_1Chw.shape[1] for map_1Chw in same), same[0].shape[2:]
        num_rows = num_images * height * width
        rows = MemoryRows(num_rows, channels, same[0].device) if kept else FileRows(num_rows, channels, folder)
        yield SameSizeMaps((height, width), rows)


def _capped(map_1Chw: Tensor, size: Size) -> Tensor:
    if map_1Chw.shape[2] <= size[0] and map_1Chw.shape[3] <= size[1]:
        return map_1Chw
    return F.interpolate(map_1Chw, size, mode="bilinear", align_corners=False)


def _pair(weight_P: Tensor) -> Tensor:
    """[P, 2]: the weights of the lower and of the higher tap."""
    return torch.stack([1 - weight_P, weight_P], dim=1)
