"""The label generator for whole images: what `LabelGenerator.reference` gives, without holding a hypercolumn.

Four identities, all exact, carry it:
1. W @ resize(F) = resize(W @ F), so the first Linear runs on coarse maps at their native resolution, for all members
   of all heads as one product;
2. W @ concat(F_1, F_2) = W_1 @ F_1 + W_2 @ F_2, so every resolution goes its own way, and a map that is the
   same for every image (the constant input) is no more than a bias that varies over the image;
3. in evaluation, BatchNorm is affine and follows the ReLU, so it folds into the Linear after it;
4. bilinear resizing of a tile of pixels is a product with a small matrix, the same for all hidden units, in
   which all resolutions meet (`label_tiles`).

It knows weights and feature maps. It does not know tasks, and nothing of training.

Shape letters: M members, P pixels, C channels, K outputs, B batch, H W output size, h w native size; D
hidden units of the first layer, of some or all members; T tiles of a strip of output rows, L pixels of a
tile, N native samples under it, S rows of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handsoff_stream.features import FeaturePyramid, Size
from handsoff_stream.label_generator.products import add_product_, linears, products
from handsoff_stream.label_generator.rows import ProjectedRows, resized_rows
from handsoff_stream.label_generator.tiles import TILE_COLUMNS, TILE_ROWS, Grid, Level, arrange, split

# Scratch of a strip in units of its first hidden layer: that, the samples under it, and temporaries.
_SCRATCH_LAYERS = 4


def working_set(device: torch.device) -> int:
    """Default bytes of scratch of `tiles`: what stays in a CPU's caches; on a GPU, what fills it."""
    return 512 << 20 if device.type == "cuda" else 16 << 20


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

    def outputs(self, pyramid: FeaturePyramid, size: Size, *, memory: int | None = None) -> Tensor:
        """Outputs of whole images, float32 [M, B, K, H, W]."""
        strips = [
            outputs_MPK.unflatten(1, (pyramid.batch_size, rows.stop - rows.start, size[1]))
            for rows, outputs_MPK in self.tiles(pyramid, size, memory=memory)
        ]
        return torch.cat(strips, dim=2).permute(0, 1, 4, 2, 3)

    def tiles(
        self, pyramid: FeaturePyramid, size: Size, *, memory: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (output rows, outputs float32 [M, P, K]) from top to bottom; P = B * rows * W, in that order.

        `memory`: bytes of scratch to aim at (None: `working_set`), beside the pyramid, what is yielded, and
        the projected rows under a strip. Images, then members, then rows are taken in smaller groups until it
        fits; one row of one member is the least.
        """
        for rows, (outputs_MPK,) in join([self]).tiles(pyramid, size, memory=memory):
            yield rows, outputs_MPK

    def check(self, pyramid: FeaturePyramid) -> None:
        """Raises ValueError if the pyramid is of another generator."""
        if pyramid.channels != self.feature_channels:
            raise ValueError(
                f"The label generator reads maps of {self.feature_channels} channels, got "
                f"{pyramid.channels}; it belongs to another generator."
            )
        if self.has_constant and pyramid.maps[0].shape[2:] != self.base_hwD.shape[:2]:
            raise ValueError(
                f"The label generator was folded with a constant map of {tuple(self.base_hwD.shape[:2])}, "
                f"the first map has {tuple(pyramid.maps[0].shape[2:])}; fold it for this generator."
            )

    def levels(self, pyramid: FeaturePyramid, full: Size) -> tuple[list[Level], list[Level]]:
        """The levels to project before resizing, and those to resize first."""
        natives = [(m.shape[2], m.shape[3]) for m in pyramid.maps]
        return arrange(pyramid.channels, natives, full, first=int(self.has_constant))

    def other_layers(self, hidden_PD: Tensor, members: slice) -> Tensor:
        """From the first Linear to the outputs [M, P, K] of some members; overwrites its input."""
        hidden_MPI = hidden_PD.relu_().unflatten(1, (members.stop - members.start, -1)).transpose(0, 1)
        hidden_MPO = linears(hidden_MPI, self.weight2_MIO[members], self.bias2_M1O[members]).relu_()
        return linears(hidden_MPO, self.weight3_MOK[members], self.bias3_M1K[members])

    def outputs_like(self, batch_size: int, height: int, width: int) -> Tensor:
        """Room for the outputs [M, B, S, W, K] of a strip."""
        shape = (len(self.weight2_MIO), batch_size, height, width, self.bias3_M1K.shape[2])
        return torch.empty(shape, device=self.weight1_CD.device)


@dataclass(frozen=True)
class JoinedLabelGenerators:
    """Label generators of one generator, whose first Linear is one product; `join` makes it."""

    first: FoldedLabelGenerator
    """Its first layer is that of all `parts`, one after another; its other layers are those of the first part."""
    parts: tuple[FoldedLabelGenerator, ...]
    """Each with its share of that layer, which is not copied."""

    @torch.no_grad()
    def tiles(
        self, pyramid: FeaturePyramid, size: Size, *, memory: int | None = None
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """As `FoldedLabelGenerator.tiles`, with the outputs of every part; maps are read once for all of them."""
        self.first.check(pyramid)
        memory = working_set(pyramid.device) if memory is None else memory
        strips, image_groups, member_groups = self._plan(size, pyramid.batch_size, memory)
        walk = _Walk(self.first, pyramid, size, strips[0].stop)
        for number, rows in enumerate(strips):
            height = rows.stop - rows.start
            outputs = [part.outputs_like(pyramid.batch_size, height, size[1]) for part in self.parts]
            walk.rows.advance(number)
            for images in image_groups:
                strip = walk.read(rows, images)
                for n, members, units in member_groups:
                    outputs_MPK = self.parts[n].other_layers(self._first_layer(strip, units), members)
                    outputs[n][members, images] = strip.in_rows(outputs_MPK, size[1])
            yield rows, [outputs_MBSWK.flatten(1, 3) for outputs_MBSWK in outputs]

    def _plan(
        self, size: Size, images: int, memory: int
    ) -> tuple[list[slice], list[slice], list[tuple[int, slice, slice]]]:
        """Groups of rows, of images, and of members as (part, members, their hidden units of the first layer)."""
        row_groups, image_groups, members, done = [], [], [], 0
        for n, part in enumerate(self.parts):
            num_members, inner, _ = part.weight2_MIO.shape
            units = memory // (_SCRATCH_LAYERS * size[1] * inner * part.weight1_CD.element_size())
            some_rows, some_images, some_members = _groups(size[0], images, num_members, units)
            row_groups.append(some_rows)
            image_groups.append(some_images)
            members += [(n, some, slice(done + some.start * inner, done + some.stop * inner)) for some in some_members]
            done += num_members * inner
        return max(row_groups, key=len), max(image_groups, key=len), members

    def _first_layer(self, strip: _Strip, units: slice) -> Tensor:
        """Some hidden units of the first Linear, before their ReLU, at every pixel of a strip: [P, D]."""
        samples_BTND = strip.rows.gather(strip.index_TN, strip.images, units)
        weight_BTLN = strip.weight_TLN.expand(len(samples_BTND), -1, -1, -1)
        hidden_PD = products(weight_BTLN.flatten(0, 1), samples_BTND.flatten(0, 1)).flatten(0, 1)
        for channels, features_PC in strip.resized:
            add_product_(hidden_PD, features_PC, self.first.weight1_CD[channels, units])
        return hidden_PD


def join(folded: Sequence[FoldedLabelGenerator]) -> JoinedLabelGenerators:
    """One first layer for several label generators of one generator, folded alike.

    Raises ValueError if they are of different generators, or were folded differently.
    """
    first, *others = folded
    if not others:
        return JoinedLabelGenerators(first, (first,))
    kinds = {(part.feature_channels, part.base_hwD.shape[:2], part.weight1_CD.dtype) for part in folded}
    if len(kinds) > 1:
        raise ValueError(
            f"Heads of one checkpoint read the same maps, these read {kinds}; each needs its own checkpoint."
        )
    widths = [part.weight1_CD.shape[1] for part in folded]
    weight1_CD = torch.cat([part.weight1_CD for part in folded], dim=1)
    base_hwD = torch.cat([part.base_hwD for part in folded], dim=2)
    shares = zip(folded, weight1_CD.split(widths, dim=1), base_hwD.split(widths, dim=2), strict=True)
    parts = tuple(replace(part, weight1_CD=weight_CD, base_hwD=base) for part, weight_CD, base in shares)
    return JoinedLabelGenerators(replace(first, weight1_CD=weight1_CD, base_hwD=base_hwD), parts)


@dataclass(frozen=True)
class _Strip:
    """The input of the first Linear for some output rows of some images; pixels are in tile order."""

    images: slice
    height: int
    rows: ProjectedRows
    index_TN: Tensor
    weight_TLN: Tensor
    resized: list[tuple[slice, Tensor]]
    """Channels, features [P, C] at output resolution."""

    def in_rows(self, outputs_MPK: Tensor, width: int) -> Tensor:
        """Tile order => [M, B, S, W, K]."""
        shape = (self.images.stop - self.images.start, len(self.index_TN), self.height, -1)
        return outputs_MPK.unflatten(1, shape).transpose(2, 3).flatten(3, 4)[:, :, :, :width]


class _Walk:
    """A pyramid on the way from the top of an output to its bottom."""

    def __init__(self, folded: FoldedLabelGenerator, pyramid: FeaturePyramid, size: Size, strip_rows: int) -> None:
        self.full, (self.top, left) = pyramid.placement(size)
        self.pyramid, self.dtype = pyramid, folded.weight1_CD.dtype
        self.columns = Grid(self.full[1], left, size[1], min(TILE_COLUMNS, size[1]))
        strips = Grid(self.full[0], self.top, size[0], strip_rows)
        projected, self.resized = folded.levels(pyramid, self.full)
        self.rows = ProjectedRows(pyramid, projected, folded.weight1_CD, folded.base_hwD, strips, self.columns)

    def read(self, rows: slice, images: slice) -> _Strip:
        grid = Grid(self.full[0], self.top + rows.start, rows.stop - rows.start, rows.stop - rows.start)
        index_TN, weight_TLN = self.rows.sampling(grid.start, grid.count)
        resized = [
            (level.channels, resized_rows(self.pyramid, level, grid, self.columns, images, self.dtype).flatten(0, 1))
            for level in self.resized
        ]
        return _Strip(images, grid.count, self.rows, index_TN, weight_TLN, resized)


def _groups(rows: int, images: int, members: int, units: int) -> tuple[list[slice], list[slice], list[slice]]:
    """Groups of rows, images and members such that rows * images * members is at most `units`, or one."""
    some_rows = min(max(units, 1), rows, TILE_ROWS)
    some_members = min(max(units // some_rows, 1), members)
    some_images = min(max(units // (some_rows * some_members), 1), images)
    return split(rows, some_rows), split(images, some_images), split(members, some_members)
