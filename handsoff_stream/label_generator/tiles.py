"""Which native feature samples lie under a tile of output pixels, and with which weights: geometry only.

Bilinear resizing gives sample i of an axis the weight max(0, 1 - |position - i|) at a position. So a tile of
output pixels is a fixed number of samples of every resolution times a small matrix of weights, and all
resolutions together are one matrix product. This module lists those samples and weights, and decides by
counting multiplications which maps are worth that. It does not know weights of networks, nor devices' speeds.

Shape letters: T tiles along an axis, L pixels of a tile along an axis, N samples under a tile, over all levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from handsoff_stream.features import Size

TILE_ROWS, TILE_COLUMNS = 8, 16
"""128 pixels: enough rows for a matrix product; a larger tile has more samples under it, so more to multiply."""


@dataclass(frozen=True)
class Level:
    """Neighbouring maps of a pyramid that share a matrix product."""

    maps: tuple[int, ...]
    """Indices into the pyramid; none for what every image adds."""
    channels: slice
    native: Size
    """(h, w) of its maps; of maps that are resized first: of the coarsest."""


def project_first(native: Size, channels: int, size: Size) -> bool:
    """Whether `channels` at `native` resolution are better projected first and then resized to `size`.

    Resizing first costs `channels` multiplications an output pixel (and hidden unit). Projecting first
    costs as many a native pixel, and one for each sample under the tile of the output pixel. Maps at or above
    the output resolution never gain.
    """
    rows, columns = (
        math.ceil(length * source / full) + 2
        for length, source, full in zip((TILE_ROWS, TILE_COLUMNS), native, size, strict=True)
    )
    pixels = size[0] * size[1]
    return channels * (pixels - native[0] * native[1]) > rows * columns * pixels


def arrange(
    channels: Sequence[int], natives: Sequence[Size], full: Size, first: int
) -> tuple[list[Level], list[Level]]:
    """Maps `first` and up as (levels to project before resizing, levels to resize first), in their order."""
    ends = [0, *accumulate(channels)]
    projected: list[Level] = []
    resized: list[Level] = []
    for native, group in groupby(range(first, len(natives)), key=lambda i: natives[i]):
        maps = tuple(group)
        level = Level(maps, slice(ends[maps[0]], ends[maps[-1] + 1]), native)
        if project_first(native, level.channels.stop - level.channels.start, full):
            projected.append(level)
        elif resized and resized[-1].maps[-1] + 1 == maps[0]:
            before = resized.pop()
            resized.append(Level(before.maps + maps, slice(before.channels.start, level.channels.stop), before.native))
        else:
            resized.append(level)
    return projected, resized


@dataclass(frozen=True)
class Grid:
    """Tiles of `length` output pixels along one axis: pixels `start .. start + count - 1` of `full`."""

    full: int
    start: int
    count: int
    length: int

    @property
    def tiles(self) -> int:
        return math.ceil(self.count / self.length)


@functools.lru_cache(maxsize=1024)
def first_samples(source: int, grid: Grid) -> tuple[list[int], int]:
    """For an axis of `source` samples: (the first sample under each tile, how many lie under any)."""
    first = _positions(torch.tensor([float(source)]), grid, torch.device("cpu"))[:, :, 0].floor().long()
    reach = (first[:, -1] + 1).clamp(max=source - 1) - first[:, 0] + 1
    return first[:, 0].tolist(), int(reach.max())


@dataclass(frozen=True, eq=False)
class Slots:
    """The samples under a tile: level, and place counted from the first sample of that level under the tile."""

    level_N: Tensor
    row_N: Tensor
    column_N: Tensor
    height_N: Tensor
    """Samples of the level along the rows, float64, as positions are."""
    width_N: Tensor

    @property
    def count(self) -> int:
        return self.level_N.shape[0]


@functools.lru_cache(maxsize=256)
def slots(natives: tuple[Size, ...], rows: Grid, columns: Grid, device: torch.device) -> Slots:
    """Slots of levels of these resolutions; the tensors are shared between callers and must not be written to."""
    entries = [
        (level, y, x, height, width)
        for level, (height, width) in enumerate(natives)
        for y in range(first_samples(height, rows)[1])
        for x in range(first_samples(width, columns)[1])
    ]
    level_N, row_N, column_N, height_N, width_N = torch.tensor(entries, dtype=torch.int64).t().contiguous().to(device)
    return Slots(level_N, row_N, column_N, height_N.double(), width_N.double())


def samples(place_N: Tensor, source_N: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Along one axis: (sample index int64 [T, N], weight float64 [T, L, N]) of each slot of each tile.

    Slots beyond the last sample have weight 0 and the index of the last one. So do pixels of the last tile
    beyond the grid: they repeat the border.
    """
    position_TLN = _positions(source_N, grid, source_N.device)
    sample_TN = position_TLN[:, 0].floor() + place_N
    weight_TLN = (1 - (position_TLN - sample_TN[:, None]).abs()).clamp_(min=0)
    return sample_TN.minimum(source_N - 1).long(), weight_TLN


def _positions(source_N: Tensor, grid: Grid, device: torch.device) -> Tensor:
    """Positions of output pixels among native samples, float64 [T, L, N], as align_corners=False defines them."""
    last = grid.start + grid.tiles * grid.length
    pixel_TL = torch.arange(grid.start, last, dtype=torch.float64, device=device).view(-1, grid.length)
    position_TLN = (pixel_TL[..., None] + 0.5) * (source_N / grid.full) - 0.5
    return position_TLN.clamp_(min=0).minimum(source_N - 1)


def split(total: int, at_most: int) -> list[slice]:
    """Slices that cover `total`, none longer than `at_most`, all but the last of one length."""
    step = math.ceil(total / math.ceil(total / at_most))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
