"""A generator's feature maps at their native resolutions, which represent the hypercolumns of all pixels.

The hypercolumn of a pixel (HandsOff, section 3.2) is the concatenation of all feature maps at that pixel, after each
map is resized to the label resolution. At 1024 x 1024 hypercolumns take 6.4 GB per image, so the pyramid of native maps
is passed on instead. This module defines the values of hypercolumns (`bilinear_taps`), and computes them for a few
pixels (`rows_at`).

Knows feature maps. Does not know which network made them, or what is predicted from them.

Shape letters: B batch, C channels of all maps together, P pixels, H W output size. All resizing, up or down, is
`F.interpolate(mode="bilinear", align_corners=False, antialias=False)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.geometry import Rectangle, Size


class Taps(NamedTuple):
    """Interpolation along one axis: output i is (1 - weight[i]) * sample[low[i]] + weight[i] * sample[high[i]]."""

    low: Tensor  # int64 [n]
    high: Tensor  # int64 [n]
    weight: Tensor  # float64 [n], in [0, 1)


@functools.lru_cache(maxsize=4096)
def bilinear_taps(source: int, full: int, start: int, count: int, device: torch.device) -> Taps:
    """Taps of outputs `start .. start + count - 1` when an axis of `source` samples is resized to `full`.

    The tensors are shared between callers and must not be written to.
    """
    position = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * (source / full) - 0.5
    position = position.clamp(0, source - 1)
    low = position.long()
    return Taps(low.to(device), (low + 1).clamp(max=source - 1).to(device), (position - low).to(device))


@dataclass(frozen=True, eq=False)
class FeaturePyramid:
    """Feature maps of a batch in hypercolumn order: the constant input, then each style block's output.

    Hypercolumns are computed in float32 (float64 for float64 maps), whatever precision the maps are stored in.

    Args:
        maps: floating point [B, C_l, h_l, w_l] each; every map covers the whole image.
        window: the part of the image that outputs show, in pixels of the finest map; set by `crop`.

    Raises:
        ValueError: no map, or maps of different batches.
    """

    maps: tuple[Tensor, ...]
    window: Rectangle | None = None

    def __post_init__(self) -> None:
        if not self.maps:
            raise ValueError("0 feature maps make no pyramid; pass at least one")
        shapes = [tuple(feature_map.shape) for feature_map in self.maps]
        if any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"feature maps {shapes} are not of one batch; pass [B, C, h, w] with one common B")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return tuple(feature_map.shape[1] for feature_map in self.maps)

    @property
    def num_channels(self) -> int:
        """C: channels of all maps together."""
        return sum(self.channels)

    @property
    def batch_size(self) -> int:
        """B: number of images."""
        return self.maps[0].shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the maps."""
        return self.maps[0].device

    @property
    def resolution(self) -> Size:
        """(H, W) of the finest map or of its crop: the output size at which one pixel is one pixel of the image."""
        return self.part.size

    @property
    def part(self) -> Rectangle:
        """`window`, or the rectangle of the whole image."""
        if self.window is not None:
            return self.window
        height, width = self.finest
        return Rectangle(0, 0, height, width)

    @property
    def finest(self) -> Size:
        """(H, W) of the finest map; windows are given in its pixels."""
        return max(m.shape[2] for m in self.maps), max(m.shape[3] for m in self.maps)

    def crop(self, rows: Size, columns: Size) -> FeaturePyramid:
        """The pyramid of a part of the image; `rows`, `columns`: (first, end) in pixels of the finest map.

        The maps stay whole, because resizing a cropped map would treat the cut as the border of the image. In the
        result, output sizes are sizes of the part: `p.crop((a, b), (c, d)).hypercolumn((b - a, d - c))` equals
        `p.hypercolumn(p.resolution)[..., a:b, c:d]`, and likewise at other scales. The coordinates of a second crop
        start at the corner of the first.

        Raises:
            ValueError: the part is empty or reaches beyond the image.
        """
        (first_row, end_row), (first_column, end_column) = rows, columns
        Rectangle(first_row, first_column, end_row, end_column).check(self.resolution)
        top, left = self.part.top, self.part.left
        window = Rectangle(top + first_row, left + first_column, top + end_row, left + end_column)
        return replace(self, window=window)

    def placement(self, size: Size) -> tuple[Size, Size]:
        """Where an output of `size` lies: (H, W) of the whole image at the output's scale, and (top, left) in it.

        Raises:
            ValueError: the crop does not fall on whole output pixels.
        """
        return self.part.placement(size, self.finest)

    def hypercolumn(self, size: Size) -> Tensor:
        """Hypercolumns of all pixels, float32 [B, C, H, W], which are very large; for the reference path and tests."""
        return torch.cat([self._resize(_promote(feature_map), size) for feature_map in self.maps], dim=1)

    def rows_at(self, pixels_P: Tensor, size: Size, sample: Tensor | None = None) -> Tensor:
        """Hypercolumns of a few pixels, float32 [P, C], without computing those of other pixels.

        Args:
            pixels_P: int64 row-major indices in an output of `size`, in [0, H * W).
            size: (H, W) of the output.
            sample: int64 [P], the image of each pixel in [0, B); required if there are several images.

        Maps in `torch.channels_last` are read faster.

        Raises:
            ValueError: several images without `sample`, or a crop that does not fall on whole output pixels.
        """
        if sample is None:
            if self.batch_size != 1:
                raise ValueError(
                    f"the pyramid holds {self.batch_size} images, so pixels are ambiguous; pass the image of each pixel"
                )
            sample = torch.zeros_like(pixels_P)
        (full_height, full_width), (top, left) = self.placement(size)
        y_P, x_P = pixels_P // size[1], pixels_P % size[1]
        rows = []
        for feature_map in self.maps:
            map_BHWC = feature_map.permute(0, 2, 3, 1)
            y = bilinear_taps(map_BHWC.shape[1], full_height, top, size[0], self.device)
            x = bilinear_taps(map_BHWC.shape[2], full_width, left, size[1], self.device)
            low = _mix(map_BHWC, sample, y.low[y_P], x, x_P)
            high = _mix(map_BHWC, sample, y.high[y_P], x, x_P)
            rows.append(torch.lerp(low, high, y.weight[y_P, None].to(low.dtype)))
        return torch.cat(rows, dim=1)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> FeaturePyramid:
        """The pyramid with all maps converted, as by `Tensor.to`."""
        maps = tuple(m.to(device=device, dtype=dtype, memory_format=memory_format) for m in self.maps)
        return replace(self, maps=maps)

    def select(self, i: int) -> FeaturePyramid:
        """The pyramid of image `i` alone, with B = 1; the maps share memory with these."""
        return replace(self, maps=tuple(m[i].unsqueeze(0) for m in self.maps))

    def _resize(self, map_BCHW: Tensor, size: Size) -> Tensor:
        full, (top, left) = self.placement(size)
        whole = F.interpolate(map_BCHW, full, mode="bilinear", align_corners=False, antialias=False)
        return whole[..., top : top + size[0], left : left + size[1]]


def _promote(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mix(map_BHWC: Tensor, sample_P: Tensor, y_P: Tensor, x: Taps, x_P: Tensor) -> Tensor:
    """Hypercolumns [P, C] of one map in its pixel rows `y_P`, interpolated along the columns."""
    low = _promote(map_BHWC[sample_P, y_P, x.low[x_P]])
    high = _promote(map_BHWC[sample_P, y_P, x.high[x_P]])
    return torch.lerp(low, high, x.weight[x_P, None].to(low.dtype))
