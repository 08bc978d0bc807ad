"""The label generator for whole images: what `LabelGenerator.reference` gives, without holding a hypercolumn.

Four identities, all exact, carry it:
1. W @ resize(F) = resize(W @ F), so the first Linear runs on coarse maps at their native resolution;
2. W @ concat(F_1, F_2) = W_1 @ F_1 + W_2 @ F_2, so every resolution goes its own way, and a map that is the
   same for every image (the constant input) is no more than a bias that varies over the image;
3. in evaluation, BatchNorm is affine and follows the ReLU, so it folds into the Linear after it;
4. bilinear resizing is separable: columns are interpolated at the native rows, which are few, and all
   resolutions then meet in one matrix product along the rows.

It knows weights and feature maps. It does not know tasks, and nothing of training.

Shape letters: M members, P pixels, C channels, K outputs, B batch, H W output size, h w native size; D
hidden units of the first layer, of some or all members; S output rows of a strip, R native rows under it,
of all resolutions together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.features import FeaturePyramid, Size, bilinear_taps

WORKING_SET = 64 << 20
"""Default bytes of scratch of `tiles`: room for efficient matrix products, and a hundredth of what the
hypercolumn of one 1024 x 1024 image takes."""

# Lower strips project native rows at their edges more often, higher ones lengthen the product along the rows.
_STRIP_ROWS = 16

# Scratch of a strip in units of its first hidden layer: that, the native rows under it, and temporaries.
_SCRATCH_LAYERS = 4

# What interpolating one projected value costs, in multiplications of the first Linear; measured on a CPU.
_INTERPOLATION_COST = 24


def project_first(native: Size, channels: int, size: Size) -> bool:
    """Whether `channels` at `native` resolution are better projected first and then resized to `size`.

    Resizing first costs `channels` multiplications an output pixel (and hidden unit). Projecting first
    costs as many a native pixel, and the interpolation. Maps at or above the output resolution never gain.
    """
    saved = channels * (size[0] * size[1] - native[0] * native[1])
    return saved > _INTERPOLATION_COST * size[0] * size[1]


@dataclass(frozen=True)
class FoldedLabelGenerator:
    """A label generator prepared for whole images; `LabelGenerator.fold` makes it and says what it holds."""

    feature_channels: tuple[int, ...]
    has_constant: bool
    """Whether `base_hwD` contains the first map, which is then not read from the pyramids."""
    weight1_CD: Tensor
    base_hwD: Tensor
    """What every image adds to the first layer: the bias [1, 1, D], or bias and constant input [h, w, D]."""
    weight2_MIO: Tensor
    bias2_M1O: Tensor
    weight3_MOK: Tensor
    bias3_M1K: Tensor

    def outputs(self, pyramid: FeaturePyramid, size: Size, *, memory: int = WORKING_SET) -> Tensor:
        """Outputs of whole images, float32 [M, B, K, H, W]."""
        strips = [
            outputs_MPK.unflatten(1, (pyramid.batch_size, rows.stop - rows.start, size[1]))
            for rows, outputs_MPK in self.tiles(pyramid, size, memory=memory)
        ]
        return torch.cat(strips, dim=2).permute(0, 1, 4, 2, 3)

    @torch.no_grad()
    def tiles(
        self, pyramid: FeaturePyramid, size: Size, *, memory: int = WORKING_SET
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (output rows, outputs float32 [M, P, K]) from top to bottom; P = B * rows * W, in that order.

        `memory`: bytes of scratch to aim at, beside the pyramid and what is yielded. Images, then members,
        then rows are taken in smaller groups until it fits; one row of one member is the least.
        """
        if pyramid.channels != self.feature_channels:
            raise ValueError(
                f"The label generator reads maps of {self.feature_channels} channels, got "
                f"{pyramid.channels}; it belongs to another generator."
            )
        members, inner, _ = self.weight2_MIO.shape
        row_bytes = _SCRATCH_LAYERS * size[1] * inner * self.weight1_CD.element_size()
        units = memory // row_bytes
        strips, image_groups, member_groups = _groups(size[0], pyramid.batch_size, members, units)
        reader, scratch = _Reader(self, pyramid, size), _Scratch(self.weight1_CD)
        for rows in strips:
            shape = (members, pyramid.batch_size, rows.stop - rows.start, size[1], self.bias3_M1K.shape[2])
            outputs_MBSWK = torch.empty(shape, device=self.weight1_CD.device)
            for images in image_groups:
                strip = reader.read(rows, images)
                for some in member_groups:
                    hidden_PD = self._first_layer(strip, some, scratch)
                    block = outputs_MBSWK[some, images]
                    block.copy_(self._other_layers(hidden_PD, some).view(block.shape))
            yield rows, outputs_MBSWK.flatten(1, 3)

    def _first_layer(self, strip: _Strip, members: slice, scratch: _Scratch) -> Tensor:
        """The first Linear of some members, before its ReLU, at every pixel of a strip: [P, D]."""
        inner = self.weight2_MIO.shape[1]
        units = slice(members.start * inner, members.stop * inner)
        rows, native_rows = strip.row_weights_SR.shape
        batch, depth = strip.batch_size, units.stop - units.start
        stack_BRWD = scratch.take("stack", (batch, native_rows, strip.width, depth))
        strip.interpolate_columns(strip.base_rwD[None, ..., units], stack_BRWD[:, : len(strip.base_rwD)])
        for channels, place, features_BrwC in strip.projected:
            strip.interpolate_columns(features_BrwC @ self.weight1_CD[channels, units], stack_BRWD[:, place])
        hidden_BSX = scratch.take("hidden", (batch, rows, strip.width * depth))
        torch.bmm(strip.row_weights_SR.expand(batch, -1, -1), stack_BRWD.flatten(2), out=hidden_BSX)
        hidden_PD = hidden_BSX.view(-1, depth)
        for channels, features_PC in strip.resized:
            hidden_PD.addmm_(features_PC, self.weight1_CD[channels, units])
        return hidden_PD

    def _other_layers(self, hidden_PD: Tensor, members: slice) -> Tensor:
        """From the first Linear to the outputs [M, P, K] of some members; overwrites its input."""
        hidden_MPI = hidden_PD.relu_().unflatten(1, (members.stop - members.start, -1)).transpose(0, 1)
        hidden_MPO = torch.baddbmm(self.bias2_M1O[members], hidden_MPI, self.weight2_MIO[members]).relu_()
        return torch.baddbmm(self.bias3_M1K[members], hidden_MPO, self.weight3_MOK[members])


@dataclass(frozen=True)
class _Strip:
    """The input of the first Linear for some output rows of some images."""

    batch_size: int
    full_width: int
    left: int
    width: int
    row_weights_SR: Tensor
    base_rwD: Tensor
    """Native rows of what every image adds; they come first among the native rows of all resolutions."""
    projected: Sequence[tuple[slice, slice, Tensor]]
    """Channels, place among the native rows of all resolutions, native rows [B, r, w, C]."""
    resized: Sequence[tuple[slice, Tensor]]
    """Channels, features [P, C] at output resolution."""

    def interpolate_columns(self, native_BrwD: Tensor, out_BrWD: Tensor) -> None:
        # Over channels-last memory this kernel runs along D, in one pass; gathering neighbours takes three.
        size = (native_BrwD.shape[1], self.full_width)
        wide_BDrW = F.interpolate(native_BrwD.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
        wanted_BDrW = wide_BDrW[..., self.left : self.left + self.width]
        out_BrWD.copy_(wanted_BDrW.permute(0, 2, 3, 1))


class _Reader:
    """Reads a pyramid where the rows of an output need it."""

    def __init__(self, folded: FoldedLabelGenerator, pyramid: FeaturePyramid, size: Size) -> None:
        self.maps, self.base_hwD, self.dtype = pyramid.maps, folded.base_hwD, folded.weight1_CD.dtype
        self.size, (self.full, (self.top, self.left)) = size, pyramid.placement(size)
        if folded.has_constant and self.maps[0].shape[2:] != self.base_hwD.shape[:2]:
            raise ValueError(
                f"The label generator was folded with a constant map of {tuple(self.base_hwD.shape[:2])}, "
                f"the first map has {tuple(self.maps[0].shape[2:])}; fold it for this generator."
            )
        self.projected, self.resized = _arrange(pyramid, self.full, first=int(folded.has_constant))

    def read(self, rows: slice, images: slice) -> _Strip:
        start, count = self.top + rows.start, rows.stop - rows.start
        heights = (len(self.base_hwD), *(self.maps[indices[0]].shape[2] for indices, _ in self.projected))
        device = self.base_hwD.device
        spans, weights_SR = _row_weights(heights, self.full[0], start, count, self.dtype, device)
        projected, end = [], spans[0].stop - spans[0].start
        for (indices, channels), span in zip(self.projected, spans[1:], strict=True):
            place = slice(end, end + span.stop - span.start)
            end = place.stop
            features_BrwC = self._concatenate([self.maps[i][images, :, span] for i in indices])
            projected.append((channels, place, features_BrwC))
        resized = []
        for indices, channels in self.resized:
            features = [self._resize(self.maps[i][images], start, count) for i in indices]
            resized.append((channels, self._concatenate(features).flatten(0, 2)))
        return _Strip(
            batch_size=len(self.maps[0][images]),
            full_width=self.full[1],
            left=self.left,
            width=self.size[1],
            row_weights_SR=weights_SR,
            base_rwD=self.base_hwD[spans[0]],
            projected=projected,
            resized=resized,
        )

    def _resize(self, map_BChw: Tensor, start: int, count: int) -> Tensor:
        """Rows `start .. start + count - 1` of a map at output resolution, [B, C, S, W]."""
        rows_BCSw = self._resample(map_BChw, 2, self.full[0], start, count)
        return self._resample(rows_BCSw, 3, self.full[1], self.left, self.size[1])

    def _resample(self, x: Tensor, dim: int, full: int, start: int, count: int) -> Tensor:
        """Positions `start .. start + count - 1` of dimension `dim`, resized to `full`."""
        source = x.shape[dim]
        if source == full:
            return x.narrow(dim, start, count).to(self.dtype)
        if source == 2 * full:
            return x.narrow(dim, 2 * start, 2 * count).to(self.dtype).unflatten(dim, (count, 2)).mean(dim + 1)
        taps = bilinear_taps(source, full, start, count, x.device)
        shape = [count if d == dim else 1 for d in range(x.ndim)]
        low, high = (x.index_select(dim, index).to(self.dtype) for index in (taps.low, taps.high))
        return torch.lerp(low, high, taps.weight.to(self.dtype).view(shape))

    def _concatenate(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, C_l, h, w] each => [B, h, w, C], in the precision of the weights."""
        return torch.cat([m.permute(0, 2, 3, 1).to(self.dtype) for m in maps], dim=3)


class _Scratch:
    """Buffers that live through one walk over the strips: fresh pages for each cost as much as the sums."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        numel = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < numel:
            self.buffers[name] = self.like.new_empty(numel)
        return self.buffers[name][:numel].view(shape)


Run = tuple[list[int], slice]
"""Neighbouring maps of a pyramid that share a matrix product, and their channels."""


def _arrange(pyramid: FeaturePyramid, full: Size, first: int) -> tuple[list[Run], list[Run]]:
    """The maps from `first` on: (those to project before resizing, by resolution; those to resize first)."""
    ends = [0, *accumulate(pyramid.channels)]
    projected: list[Run] = []
    resized: list[Run] = []
    indices = range(first, len(pyramid.maps))
    for native, group in groupby(indices, key=lambda i: tuple(pyramid.maps[i].shape[2:])):
        level = list(group)
        channels = slice(ends[level[0]], ends[level[-1] + 1])
        if project_first((native[0], native[1]), channels.stop - channels.start, full):
            projected.append((level, channels))
        elif resized and resized[-1][0][-1] + 1 == level[0]:
            before, channels_before = resized[-1]
            resized[-1] = (before + level, slice(channels_before.start, channels.stop))
        else:
            resized.append((level, channels))
    return projected, resized


def _groups(rows: int, images: int, members: int, units: int) -> tuple[list[slice], list[slice], list[slice]]:
    """Groups of rows, images and members such that rows * images * members is at most `units`, or one."""
    some_rows = min(max(units, 1), rows, _STRIP_ROWS)
    some_members = min(max(units // some_rows, 1), members)
    some_images = min(max(units // (some_rows * some_members), 1), images)
    return _split(rows, some_rows), _split(images, some_images), _split(members, some_members)


def _split(total: int, at_most: int) -> list[slice]:
    """Slices that cover `total`, none longer than `at_most`, all but the last of one length."""
    step = math.ceil(total / math.ceil(total / at_most))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


@functools.lru_cache(maxsize=4096)
def _row_weights(
    heights: tuple[int, ...], full: int, start: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[slice], Tensor]:
    """Interpolation along the rows for output rows `start ..`: (native rows by height, weights [S, R])."""
    spans, blocks = [], []
    for height in heights:
        taps = bilinear_taps(height, full, start, count, torch.device("cpu"))
        first, end = int(taps.low[0]), int(taps.high[-1]) + 1
        block = torch.zeros(count, end - first, dtype=torch.float64)
        block.scatter_add_(1, (taps.low - first)[:, None], (1 - taps.weight)[:, None])
        block.scatter_add_(1, (taps.high - first)[:, None], taps.weight[:, None])
        spans.append(slice(first, end))
        blocks.append(block)
    return spans, torch.cat(blocks, dim=1).to(device, dtype)
