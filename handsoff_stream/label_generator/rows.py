"""Reads feature maps for the first layer of a label generator: coarse ones projected, fine ones at output resolution.

`ProjectedRows` is the table from which tiles of output pixels interpolate: every native row of every coarse
level is projected once, on the way from top to bottom, and kept as long as a strip can need it. It knows maps
and the first layer's weights; the layers after it, and what they predict, it does not know.

Shape letters: B batch, C channels, h w native size, S rows of a strip, W its width, T tiles along it, N samples
under a tile, R rows of the table (one for each native pixel in it), D hidden units of all members.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from handsoff_stream.features import FeaturePyramid, Size, bilinear_taps
from handsoff_stream.label_generator.products import product
from handsoff_stream.label_generator.tiles import Grid, Level, Slots, first_samples, samples, slots

# Native pixels to project at once, if there are as many: below, reading the weights would cost more than the product.
_PROJECTED_PIXELS = 512


def table_natives(base_hwD: Tensor, levels: Sequence[Level]) -> tuple[Size, ...]:
    """Resolutions of the levels in a table: first what every image adds, then those of the maps."""
    return ((base_hwD.shape[0], base_hwD.shape[1]), *(level.native for level in levels))


class ProjectedRows:
    """Projected native pixels [R, D] of all levels: of each level a ring of as many rows as strips need.

    `strips`: the grid of the strips along the rows, `columns`: that of the tiles along a strip. `whole`: hold
    all rows of all levels at once, instead of a ring.
    """

    def __init__(
        self,
        pyramid: FeaturePyramid,
        levels: Sequence[Level],
        weight_CD: Tensor,
        base_hwD: Tensor,
        strips: Grid,
        columns: Grid,
        *,
        whole: bool = False,
    ) -> None:
        base = Level((), slice(0, 0), (base_hwD.shape[0], base_hwD.shape[1]))
        self.maps, self.batch_size, self.levels = pyramid.maps, pyramid.batch_size, (base, *levels)
        self.weight_CD, self.base_hwD, self.strips = weight_CD, base_hwD, strips
        device = weight_CD.device
        natives = table_natives(base_hwD, levels)
        self.slots: Slots = slots(natives, strips, columns, device)
        self.column_TN, self.column_weight_TLN = samples(self.slots.column_N, self.slots.width_N, columns)
        self._ahead = [-(-_PROJECTED_PIXELS // (self.batch_size * w)) for _, w in natives]
        reach = [first_samples(h, strips)[1] for h, _ in natives]
        rings = [min(h, n + ahead) for (h, _), n, ahead in zip(natives, reach, self._ahead, strict=True)]
        self.rings = [h for h, _ in natives] if whole else rings
        self.offsets = [0]
        for ring, (_, w) in zip(self.rings, natives, strict=True):
            self.offsets.append(self.offsets[-1] + ring * self.batch_size * w)
        self.table_RD = weight_CD.new_empty(self.offsets[-1], weight_CD.shape[1])
        self._ready = [0] * len(natives)
        self._reach = reach
        constants = _per_level(tuple(self.rings), tuple(self.offsets[:-1]), natives, device)
        self._ring_N, self.offset_N, *self.natives_2N = constants[:, self.slots.level_N]
        self._width_N = self.natives_2N[1]

    def advance(self, strip: int) -> None:
        """Project what strip number `strip` needs and is not there; strips come in rising order."""
        for i, level in enumerate(self.levels):
            height = level.native[0]
            firsts, reach = first_samples(height, self.strips)
            first = firsts[strip]
            end = min(first + reach, height)
            start = max(self._ready[i], first)
            if start < end:
                self._ready[i] = min(height, max(end, start + self._ahead[i]))
                self._project(i, start, self._ready[i])

    def finish(self) -> Tensor:
        """Project everything there is, and return the table; only if it holds it `whole`."""
        for i, level in enumerate(self.levels):
            self._project(i, 0, level.native[0])
        return self.table_RD

    def _project(self, i: int, start: int, end: int) -> None:
        level, ring = self.levels[i], self.rings[i]
        pixels = self.batch_size * level.native[1]
        while start < end:
            place = start % ring
            stop = min(end, start + ring - place)
            first = self.offsets[i] + place * pixels
            out_RD = self.table_RD[first : first + (stop - start) * pixels]
            if level.maps:
                maps = [self.maps[m][:, :, start:stop] for m in level.maps]
                features_rBwC = concatenate(maps, self.weight_CD.dtype).transpose(0, 1)
                out_RD.copy_(product(features_rBwC.flatten(0, 2), self.weight_CD[level.channels]))
            else:
                base_r1wD = self.base_hwD[start:stop, None]
                out_RD.view(-1, self.batch_size, *base_r1wD.shape[2:]).copy_(base_r1wD)
            start = stop

    def sampling(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """For output rows `start ..`: (table row int64 [T, N] of image 0, weights [T, S * L, N]).

        Image b lies b * `self.slots.width_N` rows further.
        """
        grid = Grid(self.strips.full, start, count, count)
        row_1N, row_weight_1SN = samples(self.slots.row_N, self.slots.height_N, grid)
        index_TN = (row_1N % self._ring_N) * (self.batch_size * self._width_N) + self.offset_N + self.column_TN
        weight_TSLN = row_weight_1SN[:, :, None] * self.column_weight_TLN[:, None]
        return index_TN, weight_TSLN.to(self.table_RD.dtype).flatten(1, 2)

    def gather(self, index_TN: Tensor, images: slice, units: slice) -> Tensor:
        """The samples [B, T, N, D] of some images and hidden units."""
        number_B = torch.arange(images.start, images.stop, device=index_TN.device)
        index_BTN = index_TN + number_B[:, None, None] * self._width_N
        return self.table_RD[:, units].index_select(0, index_BTN.flatten()).unflatten(0, index_BTN.shape)


@functools.lru_cache(maxsize=256)
def _per_level(
    rings: tuple[int, ...], offsets: tuple[int, ...], natives: tuple[Size, ...], device: torch.device
) -> Tensor:
    """(ring, first row in the table, height, width) of every level, int64 [4, levels]."""
    return torch.tensor([rings, offsets, *zip(*natives, strict=True)]).to(device)


def resized_rows(
    pyramid: FeaturePyramid, level: Level, rows: Grid, columns: Grid, images: slice, dtype: torch.dtype
) -> Tensor:
    """The maps of a level at output resolution [B, T * S * L, C], pixels tile by tile; the last tile padded."""
    maps = []
    for m in level.maps:
        rows_BCSw = _resample(pyramid.maps[m][images], 2, rows, dtype)
        maps.append(_resample(rows_BCSw, 3, columns, dtype))
    features_BSWC = concatenate(maps, dtype)
    padding = columns.tiles * columns.length - columns.count
    if padding:
        features_BSWC = torch.nn.functional.pad(features_BSWC, (0, 0, 0, padding))
    return features_BSWC.unflatten(2, (columns.tiles, columns.length)).transpose(1, 2).flatten(1, 3)


def _resample(x: Tensor, dim: int, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The pixels of `grid` along dimension `dim`."""
    source = x.shape[dim]
    if source == grid.full:
        return x.narrow(dim, grid.start, grid.count).to(dtype)
    if source == 2 * grid.full:
        return x.narrow(dim, 2 * grid.start, 2 * grid.count).to(dtype).unflatten(dim, (grid.count, 2)).mean(dim + 1)
    taps = bilinear_taps(source, grid.full, grid.start, grid.count, x.device)
    shape = [grid.count if d == dim else 1 for d in range(x.ndim)]
    low, high = (x.index_select(dim, index).to(dtype) for index in (taps.low, taps.high))
    return torch.lerp(low, high, taps.weight.to(dtype).view(shape))


def concatenate(maps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[B, C_l, h, w] each => [B, h, w, C], in `dtype`."""
    return torch.cat([m.permute(0, 2, 3, 1).to(dtype) for m in maps], dim=3)
