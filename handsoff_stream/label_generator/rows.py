"""Reads feature maps for the first layer of a label generator: coarse maps projected, fine maps at output resolution.

`ProjectedRows` is a table of projected native pixels, from which tiles of output pixels are interpolated. Every native
row of every coarse map group is projected once, from top to bottom, and kept as long as a strip can need it. Knows
feature maps and the weights of the first layer. Does not know later layers or their outputs.

Shape letters: B batch, C channels, h w native size, S rows of a strip, W its width, T tiles along it, L pixels of a
tile along it, N samples under a tile, R rows of the table (one per native pixel in it), D hidden units of all members.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from handsoff_stream.features import FeaturePyramid, bilinear_taps
from handsoff_stream.geometry import Size
from handsoff_stream.label_generator.products import product
from handsoff_stream.label_generator.tiles import Grid, MapGroup, Slots, first_samples, samples, slots

# Native pixels to project at once, if there are as many; with fewer, reading the weights would take most of the time.
_PROJECTED_PIXELS = 512


def table_natives(base_hwD: Tensor, groups: Sequence[MapGroup]) -> tuple[Size, ...]:
    """(h, w) of each group in a table: of the part that all images share, `base_hwD`, then of the map groups."""
    return ((base_hwD.shape[0], base_hwD.shape[1]), *(group.native for group in groups))


class ProjectedRows:
    """A table of projected native pixels [R, D]: for each map group a ring buffer of as many rows as a strip needs.

    Args:
        pyramid: feature maps of B images.
        groups: the map groups to project.
        weight_CD: of the first layer.
        base_hwD: the part of the first layer that all images share, [h, w, D] or [1, 1, D].
        strips: tiles along the rows of the output; a tile is a strip.
        columns: tiles along a strip.
        whole: hold all rows of all groups at once instead of ring buffers.
    """

    def __init__(
        self,
        pyramid: FeaturePyramid,
        groups: Sequence[MapGroup],
        weight_CD: Tensor,
        base_hwD: Tensor,
        strips: Grid,
        columns: Grid,
        *,
        whole: bool = False,
    ) -> None:
        base = MapGroup((), slice(0, 0), (base_hwD.shape[0], base_hwD.shape[1]))
        self.maps, self.batch_size, self.groups = pyramid.maps, pyramid.batch_size, (base, *groups)
        self.weight_CD, self.base_hwD, self.strips = weight_CD, base_hwD, strips
        device = weight_CD.device
        natives = table_natives(base_hwD, groups)
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
        constants = _per_group(tuple(self.rings), tuple(self.offsets[:-1]), natives, device)
        self._ring_N, self.offset_N, *self.natives_2N = constants[:, self.slots.group_N]
        self._width_N = self.natives_2N[1]

    def advance(self, strip: int) -> None:
        """Project the rows that strip number `strip` needs and that are missing; call with increasing numbers."""
        for i, group in enumerate(self.groups):
            height = group.native[0]
            firsts, reach = first_samples(height, self.strips)
            first = firsts[strip]
            end = min(first + reach, height)
            start = max(self._ready[i], first)
            if start < end:
                self._ready[i] = min(height, max(end, start + self._ahead[i]))
                self._project(i, start, self._ready[i])

    def finish(self) -> Tensor:
        """Project all rows of all groups, and return the table [R, D]; only for a table that is `whole`."""
        for i, group in enumerate(self.groups):
            self._project(i, 0, group.native[0])
        return self.table_RD

    def _project(self, i: int, start: int, end: int) -> None:
        group, ring = self.groups[i], self.rings[i]
        pixels = self.batch_size * group.native[1]
        while start < end:
            place = start % ring
            stop = min(end, start + ring - place)
            first = self.offsets[i] + place * pixels
            out_RD = self.table_RD[first : first + (stop - start) * pixels]
            if group.maps:
                maps = [self.maps[m][:, :, start:stop] for m in group.maps]
                features_rBwC = concatenate(maps, self.weight_CD.dtype).transpose(0, 1)
                out_RD.copy_(product(features_rBwC.flatten(0, 2), self.weight_CD[group.channels]))
            else:
                base_r1wD = self.base_hwD[start:stop, None]
                out_RD.view(-1, self.batch_size, *base_r1wD.shape[2:]).copy_(base_r1wD)
            start = stop

    def sampling(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Table rows int64 [T, N] of image 0, and weights [T, S * L, N], for `count` output rows from `start` on.

        Image b lies b * `self.slots.width_N` rows further in the table. `start` counts in the whole image.
        """
        grid = Grid(self.strips.full, start, count, count)
        row_1N, row_weight_1SN = samples(self.slots.row_N, self.slots.height_N, grid)
        index_TN = (row_1N % self._ring_N) * (self.batch_size * self._width_N) + self.offset_N + self.column_TN
        weight_TSLN = row_weight_1SN[:, :, None] * self.column_weight_TLN[:, None]
        return index_TN, weight_TSLN.to(self.table_RD.dtype).flatten(1, 2)

    def gather(self, index_TN: Tensor, images: slice, units: slice) -> Tensor:
        """The samples [B, T, N, D] of some images and some hidden units, at the table rows of `sampling`."""
        number_B = torch.arange(images.start, images.stop, device=index_TN.device)
        index_BTN = index_TN + number_B[:, None, None] * self._width_N
        return self.table_RD[:, units].index_select(0, index_BTN.flatten()).unflatten(0, index_BTN.shape)


@functools.lru_cache(maxsize=256)
def _per_group(
    rings: tuple[int, ...], offsets: tuple[int, ...], natives: tuple[Size, ...], device: torch.device
) -> Tensor:
    """Ring length, first row in the table, height and width of every group, int64 [4, groups]."""
    return torch.tensor([rings, offsets, *zip(*natives, strict=True)]).to(device)


def resized_rows(
    pyramid: FeaturePyramid, group: MapGroup, rows: Grid, columns: Grid, images: slice, dtype: torch.dtype
) -> Tensor:
    """The maps of a group at output resolution, [B, T * S * L, C], pixels ordered by tiles, the last tile padded.

    Args:
        pyramid: feature maps.
        group: whose maps.
        rows: the S output rows, as one tile.
        columns: tiles along the rows.
        images: which images of the pyramid.
        dtype: of the result.
    """
    maps = []
    for m in group.maps:
        rows_BCSw = _resample(pyramid.maps[m][images], 2, rows, dtype)
        maps.append(_resample(rows_BCSw, 3, columns, dtype))
    features_BSWC = concatenate(maps, dtype)
    padding = columns.tiles * columns.length - columns.count
    if padding:
        features_BSWC = torch.nn.functional.pad(features_BSWC, (0, 0, 0, padding))
    return features_BSWC.unflatten(2, (columns.tiles, columns.length)).transpose(1, 2).flatten(1, 3)


def _resample(x: Tensor, dim: int, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Bilinear resize along dimension `dim`, to the pixels of `grid`; an exact mean where the size halves."""
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
    """Maps [B, C_l, h, w] of one size => [B, h, w, C], in `dtype`."""
    return torch.cat([m.permute(0, 2, 3, 1).to(dtype) for m in maps], dim=3)
