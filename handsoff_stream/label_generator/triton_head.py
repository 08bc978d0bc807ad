"""Labels, divergence and mean probabilities of whole images in one CUDA kernel, for ensembles that vote (segmentation).

The results are those of `FoldedLabelGenerator.tiles` followed by majority vote and Jensen-Shannon divergence. One
program of the kernel labels a tile of 128 pixels: it computes the hidden units of one member after another in blocks,
and keeps only sums, so no hidden layer is written to memory. Products take float16 (or float32) and accumulate in
float32. Kernel parameters are pointers and numbers, which have no types. Importing this module imports Triton.

Knows tensors and the geometry of tiles. Does not know what the classes mean.

Shape letters: B images, M members, P pixels, D hidden units of the first layer of all members, O units of the second
layer, K outputs, N samples under a tile, C channels of features at output resolution, R projected rows.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.geometry import Size
from handsoff_stream.label_generator.folded import FoldedLabelGenerator
from handsoff_stream.label_generator.rows import ProjectedRows, resized_rows, table_natives
from handsoff_stream.label_generator.tiles import TILE_COLUMNS, TILE_ROWS, Grid, MapGroup, slots, split
from handsoff_stream.label_generator.triton_device import launching_on, unsuitable

TABLE_BYTES = 4 << 30  # largest table of projected rows; images are processed in groups that fit, of at least one

# What fits on the chip beside the sums of a tile: samples under a tile, feature channels, hidden units, outputs.
_MAX_SAMPLES, _MAX_CHANNELS, _MAX_HIDDEN2, _MAX_OUTPUTS = 128, 256, 128, 64
_SMALLEST, _DTYPES = 16, (torch.float16, torch.float32)  # smallest dimension, and types, of a product here


@triton.jit
def _relu(x):
    """ReLU that keeps NaN, so that a broken network is noticed."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _ratio(native, full):
    """native / full; a GPU may round it to the float beside."""
    return native / full


@triton.jit
def _samples(slots_5N, tile_y, tile_x, y, x, top, left, full_height, full_width, image, images, N: tl.constexpr):
    """Interpolation weights [P, N] of the samples under the tile, and their rows [N] in the table."""
    n = tl.arange(0, N)
    height, width = tl.load(slots_5N + 3 * N + n), tl.load(slots_5N + 4 * N + n)
    # The first sample under the tile, in whole numbers: a position that is one may come out just below in floats.
    first_y = tl.maximum((2 * (top + tile_y) + 1) * height - full_height, 0) // (2 * full_height)
    first_x = tl.maximum((2 * (left + tile_x) + 1) * width - full_width, 0) // (2 * full_width)
    sample_y = (tl.minimum(first_y, height - 1) + tl.load(slots_5N + N + n)).to(tl.float32)
    sample_x = (tl.minimum(first_x, width - 1) + tl.load(slots_5N + 2 * N + n)).to(tl.float32)
    height, width = height.to(tl.float32), width.to(tl.float32)
    scale_y, scale_x = _ratio(height, full_height), _ratio(width, full_width)
    at_y = (top + y[:, None] + 0.5) * scale_y[None, :] - 0.5
    at_x = (left + x[:, None] + 0.5) * scale_x[None, :] - 0.5
    at_y = tl.minimum(tl.maximum(at_y, 0.0), height[None, :] - 1)
    at_x = tl.minimum(tl.maximum(at_x, 0.0), width[None, :] - 1)
    near_y = tl.maximum(1 - tl.abs(at_y - sample_y[None, :]), 0.0)
    near_x = tl.maximum(1 - tl.abs(at_x - sample_x[None, :]), 0.0)
    row = tl.minimum(sample_y, height - 1).to(tl.int64) * images + image
    row = row * width.to(tl.int64) + tl.minimum(sample_x, width - 1).to(tl.int64)
    return near_y * near_x, tl.load(slots_5N + n) + row


@triton.jit
def _softmax_and_entropy(logits):
    """Probabilities [P, K] and their entropy [P] in nats; padded outputs have logits of -1e30."""
    shifted = logits - tl.max(logits, 1)[:, None]
    exp = tl.exp(shifted)
    total = tl.sum(exp, 1)
    p = exp / total[:, None]
    return p, tl.log(total) - tl.sum(p * tl.maximum(shifted, -1e4), 1)


# Longer than 60 lines, because Triton needs every pointer and size as a parameter, and one loop holds all sums on chip.
@triton.jit
def _label_head(
    table_RD,
    features_PC,
    weight1_CD,
    slots_5N,
    weight2_DO,
    bias2_MO,
    weight3_OK,
    bias3_MK,
    labels,
    divergences,
    probabilities,
    height,
    width,
    full_height,
    full_width,
    top,
    left,
    tiles_across,
    images,
    M: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    K: tl.constexpr,
    CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
):
    D: tl.constexpr = M * H1
    dtype = table_RD.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    tile_y = tl.program_id(0) // tiles_across * TH
    tile_x = tl.program_id(0) % tiles_across * TW
    pixel = tl.arange(0, TH * TW)
    y, x = tile_y + pixel // TW, tile_x + pixel % TW
    mix, row = _samples(slots_5N, tile_y, tile_x, y, x, top, left, full_height, full_width, image, images, N)
    mix, samples = mix.to(dtype), table_RD + row[:, None] * D

    # Features are stored by columns of tiles. Rows below the image repeat its last row.
    place = (image * tiles_across * TW + tile_x) * height + tl.minimum(y, height - 1) * TW + pixel % TW
    c0, c1 = tl.arange(0, C0), C0 + tl.arange(0, C1)
    features0 = tl.load(features_PC + place[:, None] * (C0 + C1) + c0[None, :])
    features1 = tl.load(features_PC + place[:, None] * (C0 + C1) + c1[None, :])

    k, o = tl.arange(0, K), tl.arange(0, H2)
    mean = tl.zeros((TH * TW, K), tl.float32)
    votes = tl.zeros((TH * TW, K), tl.int32)
    entropies = tl.zeros((TH * TW,), tl.float32)
    for m in range(M):
        second = tl.zeros((TH * TW, H2), tl.float32)
        for block in range(0, H1, BLOCK):
            d = m * H1 + block + tl.arange(0, BLOCK)
            first = tl.dot(mix, tl.load(samples + d[None, :]), input_precision="ieee")
            weight0 = tl.load(weight1_CD + c0[:, None] * D + d[None, :])
            first = tl.dot(features0, weight0, first, input_precision="ieee")
            weight1 = tl.load(weight1_CD + c1[:, None] * D + d[None, :])
            first = tl.dot(features1, weight1, first, input_precision="ieee")
            weight2 = tl.load(weight2_DO + d[:, None] * H2 + o[None, :])
            second = tl.dot(_relu(first).to(dtype), weight2, second, input_precision="ieee")
        hidden = _relu(second + tl.load(bias2_MO + m * H2 + o)[None, :]).to(dtype)
        weight3 = tl.load(weight3_OK + (m * H2 + o)[:, None] * K + k[None, :])
        logits = tl.dot(hidden, weight3, input_precision="ieee") + tl.load(bias3_MK + m * K + k)[None, :]
        p, entropy = _softmax_and_entropy(logits)
        mean += p
        entropies += entropy
        # arg max is undefined for NaN, so the smallest number replaces it here; the divergence keeps the NaN.
        vote = tl.argmax(tl.maximum(logits, -3e38), 1, tie_break_left=True)
        votes += (k[None, :] == vote[:, None]).to(tl.int32)
    mean = mean / M
    divergence = -tl.sum(mean * tl.log(tl.maximum(mean, 1e-30)), 1) - entropies / M
    inside = (y < height) & (x < width)
    out = (image * height + y) * width + x
    tl.store(labels + out, tl.argmax(votes, 1, tie_break_left=True).to(tl.int64), mask=inside)
    tl.store(divergences + out, _relu(divergence), mask=inside)
    if SOFT:
        plane = (image * CLASSES + k[None, :]) * height + y[:, None]
        there = inside[:, None] & (k < CLASSES)[None, :]
        tl.store(probabilities + plane * width + x[:, None], mean.to(tl.float16), mask=there)


def unsupported(folded: FoldedLabelGenerator, pyramid: FeaturePyramid, size: Size) -> str | None:
    """Why the kernel cannot label this geometry, as text; None if it can.

    Args:
        folded: the label generator.
        pyramid: feature maps of the geometry; their values are not read.
        size: (H, W) of the labels.
    """
    problem = unsuitable(folded.weight1_CD.device)
    if problem is not None:
        return problem
    _, inner, hidden = folded.weight2_MIO.shape
    outputs = folded.weight3_MOK.shape[2]
    full, _ = pyramid.placement(size)
    projected, resized = folded.map_groups(pyramid, full)
    natives = table_natives(folded.base_hwD, projected)
    count = slots(natives, *_grids(pyramid, size), folded.weight1_CD.device).count
    channels = sum(group.channels.stop - group.channels.start for group in resized)
    limits = {
        f"{count} samples under a tile, at most {_MAX_SAMPLES} fit": count <= _MAX_SAMPLES,
        f"{channels} channels at output resolution, at most {_MAX_CHANNELS} fit": channels <= _MAX_CHANNELS,
        f"{inner} hidden units, which is no multiple of {_SMALLEST}": inner % _SMALLEST == 0,
        f"{hidden} units in the second layer, at most {_MAX_HIDDEN2} fit": hidden <= _MAX_HIDDEN2,
        f"{outputs} classes, at most {_MAX_OUTPUTS} fit": outputs <= _MAX_OUTPUTS,
        f"{folded.weight1_CD.dtype} weights, which it does not multiply": folded.weight1_CD.dtype in _DTYPES,
    }
    return next((problem for problem, fits in limits.items() if not fits), None)


class FusedLabelHead:
    """An ensemble that votes, prepared for feature pyramids of one geometry; calling it labels whole images.

    Args:
        folded: the label generator, in float16 or float32.
        example: a pyramid of the geometry; its values are not read, so it may be on the meta device.
        size: (H, W) of the labels.
        soft: whether to give the mean probabilities, too.

    Raises:
        ValueError: the kernel cannot label this geometry (see `unsupported`), or the pyramid is of another generator.
    """

    def __init__(self, folded: FoldedLabelGenerator, example: FeaturePyramid, size: Size, soft: bool = False) -> None:
        folded.check(example)
        self._geometry = _geometry(example)
        problem = unsupported(folded, example, size)
        if problem is not None:
            raise ValueError(f'the fused kernel cannot label this: {problem}; use kernel="auto" or kernel="torch"')
        self.folded, self.size, self._soft = folded, size, soft
        self._rows, self._columns = _grids(example, size)
        self._projected, self._resized = folded.map_groups(example, (self._rows.full, self._columns.full))
        self._weights = _weights(folded, self._resized)
        pixels = sum(h * w for h, w in table_natives(folded.base_hwD, self._projected))
        image_bytes = pixels * folded.weight1_CD.shape[1] * folded.weight1_CD.element_size()
        self._images_at_once = max(1, TABLE_BYTES // image_bytes)

    @torch.no_grad()
    def __call__(self, pyramid: FeaturePyramid) -> tuple[Tensor, ...]:
        """Majority vote, int64 [B, H, W], and Jensen-Shannon divergence, float32 [B, H, W] in nats, of B images; if
        `soft`, also the mean of the members' class probabilities, float16 [B, K, H, W].

        Raises:
            ValueError: the pyramid has another geometry than the example.
        """
        if _geometry(pyramid) != self._geometry:
            raise ValueError(
                f"got maps and crop {_geometry(pyramid)}, but the kernel was prepared for {self._geometry}; prepare "
                "another"
            )
        images, classes, device = pyramid.batch_size, self.folded.weight3_MOK.shape[2], pyramid.device
        labels = torch.empty(images, *self.size, dtype=torch.int64, device=device)
        divergences = torch.empty(images, *self.size, device=device)
        probabilities = torch.empty(images, classes * self._soft, *self.size, dtype=torch.float16, device=device)
        for some in split(images, self._images_at_once):
            part = replace(pyramid, maps=tuple(m[some] for m in pyramid.maps))
            self._launch(part, labels[some], divergences[some], probabilities[some])
        return (labels, divergences, probabilities) if self._soft else (labels, divergences)

    def _launch(self, pyramid: FeaturePyramid, *written: Tensor) -> None:
        folded, weights, rows, columns = self.folded, self._weights, self._rows, self._columns
        table = ProjectedRows(pyramid, self._projected, folded.weight1_CD, folded.base_hwD, rows, columns, whole=True)
        table_RD, slots_5N = table.finish(), _padded_slots(table)
        features_PC = self._features(pyramid)
        members, inner, _ = folded.weight2_MIO.shape
        hidden = weights.bias2_MO.shape[1]
        with launching_on(pyramid.device):
            _label_head[(rows.tiles * columns.tiles, pyramid.batch_size)](
                *(table_RD, features_PC, weights.weight1_CD, slots_5N, weights.weight2_DO, weights.bias2_MO),
                *(weights.weight3_OK, weights.bias3_MK, *written),
                *(*self.size, rows.full, columns.full, rows.start, columns.start, columns.tiles, pyramid.batch_size),
                M=members,
                H1=inner,
                H2=hidden,
                K=weights.bias3_MK.shape[1],
                CLASSES=folded.weight3_MOK.shape[2],
                SOFT=self._soft,
                C0=weights.channels[0],
                C1=weights.channels[1],
                N=slots_5N.shape[1],
                BLOCK=math.gcd(inner, 64),
                TH=TILE_ROWS,
                TW=TILE_COLUMNS,
                num_warps=8,
                num_stages=3 if hidden <= 32 and sum(weights.channels) <= 192 else 2,
            )

    def _features(self, pyramid: FeaturePyramid) -> Tensor:
        """Features at output resolution [P, C], stored by columns of tiles, with channels padded as the weights are."""
        every, whole = slice(0, pyramid.batch_size), replace(self._rows, length=self._rows.count)
        dtype = self.folded.weight1_CD.dtype
        resized = [
            resized_rows(pyramid, group, whole, self._columns, every, dtype).flatten(0, 1) for group in self._resized
        ]
        pixels = pyramid.batch_size * self._columns.tiles * self._columns.length * self._rows.count
        none = torch.empty(pixels, 0, dtype=dtype, device=pyramid.device)
        return _pad(torch.cat([none, *resized], dim=1), sum(self._weights.channels), dim=1)


def _geometry(pyramid: FeaturePyramid) -> tuple[object, ...]:
    return tuple(m.shape[1:] for m in pyramid.maps), pyramid.window


def _grids(pyramid: FeaturePyramid, size: Size) -> tuple[Grid, Grid]:
    full, (top, left) = pyramid.placement(size)
    return Grid(full[0], top, size[0], TILE_ROWS), Grid(full[1], left, size[1], TILE_COLUMNS)


@dataclass(frozen=True)
class _Weights:
    """The folded weights as the kernel reads them, with dimensions padded to powers of two."""

    channels: tuple[int, int]
    """Two powers of two, whose sum is the padded number of channels."""
    weight1_CD: Tensor
    """Of the channels at output resolution only."""
    weight2_DO: Tensor
    bias2_MO: Tensor
    weight3_OK: Tensor
    bias3_MK: Tensor


def _weights(folded: FoldedLabelGenerator, resized: Sequence[MapGroup]) -> _Weights:
    weight1_CD = torch.cat([folded.weight1_CD[:0], *(folded.weight1_CD[group.channels] for group in resized)])
    channels = _chunks(len(weight1_CD))
    hidden, outputs = (_power_of_two(n) for n in folded.weight3_MOK.shape[1:])
    weight2_DO = _pad(folded.weight2_MIO.flatten(0, 1), hidden, dim=1)
    weight3_MOK = _pad(_pad(folded.weight3_MOK, hidden, dim=1), outputs, dim=2)
    bias2_MO = _pad(folded.bias2_M1O.flatten(1).float(), hidden, dim=1)
    bias3_MK = _pad(folded.bias3_M1K.flatten(1).float(), outputs, dim=1, value=-1e30)
    return _Weights(
        channels, _pad(weight1_CD, sum(channels), dim=0), weight2_DO, bias2_MO, weight3_MOK.flatten(0, 1), bias3_MK
    )


def _padded_slots(table: ProjectedRows) -> Tensor:
    """First table row of the map group, row, column, height and width of each slot, int64 [5, N], padded in N."""
    slots_5N = torch.stack([table.offset_N, table.slots.row_N, table.slots.column_N, *table.natives_2N])
    # A padded slot is sample 2 of an axis with one sample: positions are clamped to sample 0, so its weight is 0.
    length = _power_of_two(slots_5N.shape[1])
    padded = [_pad(row, length, dim=0, value=value) for row, value in zip(slots_5N, (0, 2, 2, 1, 1), strict=True)]
    return torch.stack(padded)


def _chunks(channels: int) -> tuple[int, int]:
    """Two powers of two, at least 16 each, whose sum holds `channels` with little padding."""
    first = max(_SMALLEST, _power_of_two(channels) // 2)
    return first, _power_of_two(max(channels - first, 1))


def _power_of_two(at_least: int) -> int:
    return max(_SMALLEST, 1 << (at_least - 1).bit_length())


def _pad(x: Tensor, length: int, *, dim: int, value: float = 0.0) -> Tensor:
    """`x` with dimension `dim` filled up to `length` with `value`."""
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([x, x.new_full(shape, value)], dim=dim)
