"""Which samples of the feature maps lie under a tile of output pixels, and with which weights: geometry only.

Along an axis, bilinear resizing gives sample i the weight max(0, 1 - |position - i|) at a position. A tile of output
pixels is therefore a small matrix of weights times a fixed number of samples of every resolution, and one matrix
product serves all resolutions. This module lists the samples and weights, and decides by counting multiplications for
which maps that pays. Knows sizes. Does not know feature values, networks or the speed of devices.

Shape letters: T tiles along an axis, L pixels of a tile along an axis, N samples under a tile in all map groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from handsoff_stream.geometry import Size

TILE_ROWS, TILE_COLUMNS = 8, 16
"""Pixels of a tile: enough rows for an efficient matrix product; a larger tile has more samples to multiply."""


@dataclass(frozen=True)
class MapGroup:
    """Adjacent maps of a pyramid that share a matrix product."""

    maps: tuple[int, ...]
    """Their indices in the pyramid; empty for the part of the first layer that all images share."""
    channels: slice
    """Their channels in the hypercolumn."""
    native: Size
    """(h, w) of the maps; of maps that are resized first, (h, w) of the coarsest."""


def project_first(native: Size, channels: int, size: Size) -> bool:
    """Whether projecting before resizing takes fewer multiplications than resizing first.

    Per hidden unit, resizing first takes `channels` multiplications per output pixel. Projecting first takes `channels`
    per native pixel, and per output pixel one for each sample under its tile. Maps of at least the output resolution
    never gain.

    Args:
        native: (h, w) of the maps.
        channels: of the maps together.
        size: (H, W) of the whole image at the scale of the outputs.
    """
    rows, columns = (
        math.ceil(length * source / full) + 2
        for length, source, full in zip((TILE_ROWS, TILE_COLUMNS), native, size, strict=True)
    )
    pixels = size[0] * size[1]
    return channels * (pixels - native[0] * native[1]) > rows * columns * pixels


def arrange(
    channels: Sequence[int], natives: Sequence[Size], full: Size, first: int
) -> tuple[list[MapGroup], list[MapGroup]]:
    """Group the maps of a pyramid: the groups to project before resizing, and those to resize first, in map order.

    Args:
        channels: of each map.
        natives: (h, w) of each map.
        full: (H, W) of the whole image at the scale of the outputs.
        first: index of the first map to include.
    """
    ends = [0, *accumulate(channels)]
    projected: list[MapGroup] = []
    resized: list[MapGroup] = []
    for native, indices in groupby(range(first, len(natives)), key=lambda i: natives[i]):
        maps = tuple(indices)
        group = MapGroup(maps, slice(ends[maps[0]], ends[maps[-1] + 1]), native)
        if project_first(native, group.channels.stop - group.channels.start, full):
            projected.append(group)
        elif resized and resized[-1].maps[-1] + 1 == maps[0]:
            last = resized.pop()
            resized.append(MapGroup(last.maps + maps, slice(last.channels.start, group.channels.stop), last.native))
        else:
            resized.append(group)
    return projected, resized


@dataclass(frozen=True)
class Grid:
    """Output pixels along one axis, divided into tiles."""

    full: int
    """Pixels of the whole image."""
    start: int
    """The first pixel of the output in the whole image."""
    count: int
    """Pixels of the output."""
    length: int
    """Pixels of a tile; the last tile may reach beyond the output."""

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return math.ceil(self.count / self.length)


@functools.lru_cache(maxsize=1024)
def first_samples(source: int, grid: Grid) -> tuple[list[int], int]:
    """The first sample under each tile, and the largest number of samples under a tile, of an axis of `source`."""
    first = _positions(torch.tensor([float(source)]), grid, torch.device("cpu"))[:, :, 0].floor().long()
    reach = (first[:, -1] + 1).clamp(max=source - 1) - first[:, 0] + 1
    return first[:, 0].tolist(), int(reach.max())


@dataclass(frozen=True, eq=False)
class Slots:
    """The samples under a tile of any place: a slot is a sample's place relative to the first one of its map group."""

    group_N: Tensor
    """int64, number of the map group."""
    row_N: Tensor
    """int64, rows below the first sample of the group under the tile."""
    column_N: Tensor
    """int64, columns to the right of it."""
    height_N: Tensor
    """Rows of the maps of the group; float64, as positions are."""
    width_N: Tensor
    """Columns of the maps of the group, float64."""

    @property
    def count(self) -> int:
        """N."""
        return self.group_N.shape[0]


@functools.lru_cache(maxsize=256)
def slots(natives: tuple[Size, ...], rows: Grid, columns: Grid, device: torch.device) -> Slots:
    """The slots of map groups of these resolutions.

    The tensors are shared between callers and must not be written to.

    Args:
        natives: (h, w) of each group.
        rows: tiles along the rows.
        columns: tiles along the columns.
        device: of the tensors.
    """
    entries = [
        (group, y, x, height, width)
        for group, (height, width) in enumerate(natives)
        for y in range(first_samples(height, rows)[1])
        for x in range(first_samples(width, columns)[1])
    ]
    group_N, row_N, column_N, height_N, width_N = torch.tensor(entries, dtype=torch.int64).t().contiguous().to(device)
    return Slots(group_N, row_N, column_N, height_N.double(), width_N.double())


def samples(place_N: Tensor, source_N: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Along one axis, the sample index int64 [T, N] and the weight float64 [T, L, N] of each slot of each tile.

    A slot beyond the last sample has the index of the last sample and weight 0. Pixels of the last tile beyond the
    whole image repeat its border.

    Args:
        place_N: int64, place of each slot along the axis, such as `Slots.row_N`.
        source_N: float64, samples along the axis, such as `Slots.height_N`.
        grid: tiles along the axis.
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
    """Slices that cover `range(total)`: as few as possible of at most `at_most`, all but the last of one length."""
    step = math.ceil(total / math.ceil(total / at_most))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
