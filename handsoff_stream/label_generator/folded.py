"""The label generator for whole images: the results of `LabelGenerator.reference` without holding a hypercolumn.

It uses four identities, all exact:

1. W @ resize(F) = resize(W @ F): the first Linear commutes with the resize, so it runs on coarse maps at their native
   resolution, for all members of all heads in one matrix product.
2. W @ concat(F_1, F_2) = W_1 @ F_1 + W_2 @ F_2: each resolution contributes a separate term. The term of a map that is
   the same for every image (the constant input) is a bias that varies over the image.
3. In eval mode, BatchNorm is affine. It follows the ReLU, so it folds into the Linear after it.
4. Bilinear resizing of a tile of pixels is a product with a small matrix, the same for all hidden units; one matrix
   serves all resolutions (see `tiles`).

Knows weights and feature maps. Does not know tasks or training.

Shape letters: M members, P pixels, C channels, K outputs, B batch, H W output size, h w native size; I O inputs and
outputs of the second Linear; D hidden units of the first layer, of some or all members; T tiles of a strip of output
rows, L pixels of a tile, N native samples under a tile, S rows of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.geometry import Size
from handsoff_stream.label_generator.products import add_product_, linears, products
from handsoff_stream.label_generator.rows import ProjectedRows, resized_rows
from handsoff_stream.label_generator.tiles import TILE_COLUMNS, TILE_ROWS, Grid, MapGroup, arrange, split

# Scratch memory of a strip in units of its first hidden layer: the layer, the samples under it, and temporaries.
_SCRATCH_LAYERS = 4


def default_scratch(device: torch.device) -> int:
    """Bytes of scratch memory that suit a device: on a CPU what its caches hold, on a GPU enough to occupy it."""
    return 512 << 20 if device.type == "cuda" else 16 << 20


@dataclass(frozen=True)
class FoldedLabelGenerator:
    """A label generator prepared for whole images, in one dtype; made by `LabelGenerator.fold`."""

    feature_channels: tuple[int, ...]
    """Channels of each map of the pyramids that it reads."""
    has_constant: bool
    """Whether `base_hwD` includes the first map, which is then not read from the pyramids."""
    weight1_CD: Tensor
    """Of the first Linear, [C, D]."""
    base_hwD: Tensor
    """The part of the first layer that all images share: its bias [1, 1, D], or bias and constant input [h, w, D]."""
    weight2_MIO: Tensor
    """Of the second Linear with the first BatchNorm folded in, [M, I, O]."""
    bias2_M1O: Tensor
    weight3_MOK: Tensor
    """Of the third Linear with the second BatchNorm folded in, [M, O, K]."""
    bias3_M1K: Tensor

    def tiles(
        self, pyramid: FeaturePyramid, size: Size, *, memory: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield strips of output rows from top to bottom, with their outputs float32 [M, P, K].

        P = B * rows * W, in that order.

        Args:
            pyramid: feature maps of B images.
            size: (H, W) of the outputs.
            memory: bytes of scratch memory to aim at; None: `default_scratch`. The pyramid, the yielded outputs and
                the projected rows under a strip come on top. Images, then members, then rows are processed in smaller
                groups until the scratch memory suffices; the smallest group is one row of one member of one image.

        Raises:
            ValueError: the pyramid is of another generator, or its crop does not fall on whole output pixels.
        """
        for rows, (outputs_MPK,) in join([self]).tiles(pyramid, size, memory=memory):
            yield rows, outputs_MPK

    def check(self, pyramid: FeaturePyramid) -> None:
        """Check that a pyramid is of the generator that this label generator belongs to.

        Raises:
            ValueError: it is not.
        """
        if pyramid.channels != self.feature_channels:
            raise ValueError(
                f"got feature maps of {pyramid.channels} channels, but the label generator reads maps of "
                f"{self.feature_channels} channels, from another generator; label the maps of that one"
            )
        if self.has_constant and pyramid.maps[0].shape[2:] != self.base_hwD.shape[:2]:
            raise ValueError(
                f"the first feature map has (h, w) {tuple(pyramid.maps[0].shape[2:])}, but the label generator was "
                f"folded with a constant map of {tuple(self.base_hwD.shape[:2])}; fold it for this generator"
            )

    def map_groups(self, pyramid: FeaturePyramid, full: Size) -> tuple[list[MapGroup], list[MapGroup]]:
        """The maps to project before resizing, and those to resize first.

        Args:
            pyramid: feature maps.
            full: (H, W) of the whole image at the scale of the outputs.
        """
        natives = [(m.shape[2], m.shape[3]) for m in pyramid.maps]
        return arrange(pyramid.channels, natives, full, first=int(self.has_constant))

    def other_layers(self, hidden_PD: Tensor, members: slice) -> Tensor:
        """Outputs [M, P, K] of some members from the output of the first Linear, [P, D], which is overwritten."""
        hidden_MPI = hidden_PD.relu_().unflatten(1, (members.stop - members.start, -1)).transpose(0, 1)
        hidden_MPO = linears(hidden_MPI, self.weight2_MIO[members], self.bias2_M1O[members]).relu_()
        return linears(hidden_MPO, self.weight3_MOK[members], self.bias3_M1K[members])

    def outputs_like(self, batch_size: int, height: int, width: int) -> Tensor:
        """An uninitialized tensor for the outputs of a strip, float32 [M, B, S, W, K]."""
        shape = (len(self.weight2_MIO), batch_size, height, width, self.bias3_M1K.shape[2])
        return torch.empty(shape, device=self.weight1_CD.device)


@dataclass(frozen=True)
class JoinedLabelGenerators:
    """Label generators of one generator, which compute their first Linear in one product; made by `join`."""

    first: FoldedLabelGenerator
    """Its first layer is that of all `parts`, side by side; its other layers are those of the first part."""
    parts: tuple[FoldedLabelGenerator, ...]
    """The label generators; their first layers are views of the joint one."""

    @torch.no_grad()
    def tiles(
        self, pyramid: FeaturePyramid, size: Size, *, memory: int | None = None
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """As `FoldedLabelGenerator.tiles`, with the outputs of every part; feature maps are read once for all parts."""
        self.first.check(pyramid)
        memory = default_scratch(pyramid.device) if memory is None else memory
        strips, image_groups, member_groups = self._plan(size, pyramid.batch_size, memory)
        reader = _StripReader(self.first, pyramid, size, strips[0].stop)
        for number, rows in enumerate(strips):
            height = rows.stop - rows.start
            outputs = [part.outputs_like(pyramid.batch_size, height, size[1]) for part in self.parts]
            reader.rows.advance(number)
            for images in image_groups:
                strip = reader.read(rows, images)
                for n, members, units in member_groups:
                    outputs_MPK = self.parts[n].other_layers(self._first_layer(strip, units), members)
                    outputs[n][members, images] = strip.in_rows(outputs_MPK, size[1])
            yield rows, [outputs_MBSWK.flatten(1, 3) for outputs_MBSWK in outputs]

    def _plan(
        self, size: Size, images: int, memory: int
    ) -> tuple[list[slice], list[slice], list[tuple[int, slice, slice]]]:
        """Groups of rows, of images, and of members; the last as (part, members, their units of the first layer)."""
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
        """Some units of the first Linear, before the ReLU, at every pixel of a strip: [P, D]."""
        samples_BTND = strip.rows.gather(strip.index_TN, strip.images, units)
        weight_BTLN = strip.weight_TLN.expand(len(samples_BTND), -1, -1, -1)
        hidden_PD = products(weight_BTLN.flatten(0, 1), samples_BTND.flatten(0, 1)).flatten(0, 1)
        for channels, features_PC in strip.resized:
            add_product_(hidden_PD, features_PC, self.first.weight1_CD[channels, units])
        return hidden_PD


def join(folded: Sequence[FoldedLabelGenerator]) -> JoinedLabelGenerators:
    """Join the first layers of label generators of one generator.

    Args:
        folded: at least one, all folded with the same constant map and dtype.

    Raises:
        ValueError: they are of different generators, or were folded differently.
    """
    first, *others = folded
    if not others:
        return JoinedLabelGenerators(first, (first,))
    kinds = {(part.feature_channels, part.base_hwD.shape[:2], part.weight1_CD.dtype) for part in folded}
    if len(kinds) > 1:
        raise ValueError(
            f"the heads read {kinds}, but the heads of one checkpoint read the same maps; give each a checkpoint"
        )
    widths = [part.weight1_CD.shape[1] for part in folded]
    weight1_CD = torch.cat([part.weight1_CD for part in folded], dim=1)
    base_hwD = torch.cat([part.base_hwD for part in folded], dim=2)
    shares = zip(folded, weight1_CD.split(widths, dim=1), base_hwD.split(widths, dim=2), strict=True)
    parts = tuple(replace(part, weight1_CD=weight_CD, base_hwD=base) for part, weight_CD, base in shares)
    return JoinedLabelGenerators(replace(first, weight1_CD=weight1_CD, base_hwD=base_hwD), parts)


@dataclass(frozen=True)
class _Strip:
    """The inputs of the first Linear for some output rows of some images; pixels are ordered by tiles."""

    images: slice
    height: int
    rows: ProjectedRows
    index_TN: Tensor
    weight_TLN: Tensor
    resized: list[tuple[slice, Tensor]]
    """Channels, and their features [P, C] at output resolution."""

    def in_rows(self, outputs_MPK: Tensor, width: int) -> Tensor:
        """Outputs of pixels ordered by tiles => [M, B, S, W, K]."""
        shape = (self.images.stop - self.images.start, len(self.index_TN), self.height, -1)
        return outputs_MPK.unflatten(1, shape).transpose(2, 3).flatten(3, 4)[:, :, :, :width]


class _StripReader:
    """Reads the inputs of the first Linear from a pyramid, strip by strip from top to bottom."""

    def __init__(self, folded: FoldedLabelGenerator, pyramid: FeaturePyramid, size: Size, strip_rows: int) -> None:
        self.full, (self.top, left) = pyramid.placement(size)
        self.pyramid, self.dtype = pyramid, folded.weight1_CD.dtype
        self.columns = Grid(self.full[1], left, size[1], min(TILE_COLUMNS, size[1]))
        strips = Grid(self.full[0], self.top, size[0], strip_rows)
        projected, self.resized = folded.map_groups(pyramid, self.full)
        self.rows = ProjectedRows(pyramid, projected, folded.weight1_CD, folded.base_hwD, strips, self.columns)

    def read(self, rows: slice, images: slice) -> _Strip:
        grid = Grid(self.full[0], self.top + rows.start, rows.stop - rows.start, rows.stop - rows.start)
        index_TN, weight_TLN = self.rows.sampling(grid.start, grid.count)
        resized = [
            (group.channels, resized_rows(self.pyramid, group, grid, self.columns, images, self.dtype).flatten(0, 1))
            for group in self.resized
        ]
        return _Strip(images, grid.count, self.rows, index_TN, weight_TLN, resized)


def _groups(rows: int, images: int, members: int, units: int) -> tuple[list[slice], list[slice], list[slice]]:
    """Groups of rows, images and members such that rows * images * members is at most `units`, or else 1."""
    some_rows = min(max(units, 1), rows, TILE_ROWS)
    some_members = min(max(units // some_rows, 1), members)
    some_images = min(max(units // (some_rows * some_members), 1), images)
    return split(rows, some_rows), split(images, some_images), split(members, some_members)
