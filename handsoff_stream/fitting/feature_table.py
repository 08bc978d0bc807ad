"""Feature maps of all inverted images, and the hypercolumns of a few of their pixels at a time.

Maps are kept at native resolution in float16, one table of rows per resolution: 3 MB an image at 128 x 128,
0.16 GB at 1024 x 1024 with labels of 512 x 512, against 6.4 GB for its hypercolumns. A pixel's row is four weighted
rows of every table.

Knows generators and pyramids. Does not know labels. Sampling is that of `features`, up to float16.

Shape letters: N images, P pixels, C feature channels, L number of style inputs, D latent size, H W label
size, h w native size.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.features import Size, bilinear_taps
from handsoff_stream.generators import Generator


class FeatureTable:
    """Rows of hypercolumns of N images at one label size.

    `levels`: floating point [N, C_l, h_l, w_l], in hypercolumn order. `feature_channels`: the geometry of the
    generator's pyramids; several consecutive maps may share a level.
    """

    def __init__(self, levels: Sequence[Tensor], size: Size, feature_channels: Sequence[int]) -> None:
        if sum(feature_channels) != sum(level.shape[1] for level in levels):
            raise ValueError(
                f"levels have {[level.shape[1] for level in levels]} channels, which is not the sum of "
                f"feature_channels {list(feature_channels)}; pass the generator's feature_channels"
            )
        self.size, self.feature_channels = size, tuple(feature_channels)
        self.num_images, self.device = len(levels[0]), levels[0].device
        self._sizes = [(level.shape[2], level.shape[3]) for level in levels]
        self._tables = [level.permute(0, 2, 3, 1).half().flatten(0, 2) for level in levels]

    @classmethod
    @torch.no_grad()
    def collect(
        cls, generator: Generator, w_plus_NLD: Tensor, size: Size | None = None, *, batch_size: int = 8
    ) -> "FeatureTable":
        """Run the generator on all latents; the table lies on its device. `size` is by default its resolution.

        Neighbouring maps of one resolution share a level. Maps finer than the labels are reduced to their size
        (HandsOff, section 3.2, caps at 512 x 512): hypercolumns take nothing else from them.
        """
        size = size or generator.resolution
        chunks = []
        for chunk_BLD in w_plus_NLD.to(generator.w_avg.device).split(batch_size):
            maps = [_capped(m, size) for m in generator.synthesis(chunk_BLD, "const").features.maps]
            levels = groupby(maps, key=lambda map_BChw: map_BChw.shape[2:])
            chunks.append([torch.cat(list(same), dim=1).half() for _, same in levels])
        return cls([torch.cat(level) for level in zip(*chunks, strict=True)], size, generator.feature_channels)

    def rows(self, pixels_P: Tensor) -> Tensor:
        """Hypercolumns float32 [P, C] of pixels, by their flat int64 index into [N, H, W]."""
        height, width = self.size
        pixels_P = pixels_P.to(self.device)
        image_P, y_P, x_P = pixels_P // (height * width), pixels_P // width % height, pixels_P % width
        rows = []
        for (native_h, native_w), table in zip(self._sizes, self._tables, strict=True):
            y = bilinear_taps(native_h, height, 0, height, self.device)
            x = bilinear_taps(native_w, width, 0, width, self.device)
            row_P2 = image_P[:, None] * native_h + torch.stack([y.low[y_P], y.high[y_P]], dim=1)
            column_P2 = torch.stack([x.low[x_P], x.high[x_P]], dim=1)
            index_P4 = (row_P2[:, :, None] * native_w + column_P2[:, None, :]).flatten(1)
            weight_P4 = (_pair(y.weight[y_P])[:, :, None] * _pair(x.weight[x_P])[:, None, :]).flatten(1)
            mixed = F.embedding_bag(index_P4, table, per_sample_weights=weight_P4.to(table.dtype), mode="sum")
            rows.append(mixed.float())
        return torch.cat(rows, dim=1)


def _capped(map_BChw: Tensor, size: Size) -> Tensor:
    if map_BChw.shape[2] <= size[0] and map_BChw.shape[3] <= size[1]:
        return map_BChw
    return F.interpolate(map_BChw, size, mode="bilinear", align_corners=False)


def _pair(weight_P: Tensor) -> Tensor:
    """[P, 2]: the weights of the lower and of the higher tap."""
    return torch.stack([1 - weight_P, weight_P], dim=1)
