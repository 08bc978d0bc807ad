"""The pyramid represents hypercolumns: all that is read from it equals that part of the full hypercolumns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handsoff_stream.features import FeaturePyramid, bilinear_taps

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")


def pyramid(batch: int = 2, sizes: tuple[tuple[int, int], ...] = ((4, 4), (4, 4), (8, 8), (16, 16))) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(1)
    return FeaturePyramid(tuple(torch.randn(batch, 3 + i, *s, generator=generator) for i, s in enumerate(sizes)))


def published_pyramid() -> tuple[FeaturePyramid, Tensor]:
    with np.load(DATA / "rosinality_32_expected.npz") as data:
        maps = tuple(torch.from_numpy(data[f"feat_{i:02d}"]) for i in range(8))
        return FeaturePyramid(maps), torch.from_numpy(data["hypercolumn16_bilinear"])


def test_hypercolumn_matches_the_published_code() -> None:
    features, expected = published_pyramid()
    assert features.channels == (32, 32, 24, 24, 20, 20, 12, 12) and features.num_channels == 176
    torch.testing.assert_close(features.hypercolumn((16, 16)), expected, atol=1e-5, rtol=0)


def test_rows_at_matches_the_published_code() -> None:
    features, expected = published_pyramid()
    pixels = torch.tensor([0, 15, 16, 100, 255, 100])
    rows = features.rows_at(pixels, (16, 16))
    torch.testing.assert_close(rows, expected[0].flatten(1).T[pixels], atol=1e-5, rtol=0)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_taps_are_the_bilinear_resize_of_one_axis(source: int, full: int) -> None:
    signal = torch.randn(source, generator=torch.Generator().manual_seed(source), dtype=torch.float64)
    expected = F.interpolate(signal[None, None, None], (1, full), mode="bilinear", align_corners=False).flatten()
    taps = bilinear_taps(source, full, 0, full, CPU)
    torch.testing.assert_close(torch.lerp(signal[taps.low], signal[taps.high], taps.weight), expected)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 8), (5, 7), (24, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_at_are_pixels_of_the_hypercolumn(size: tuple[int, int], layout: torch.memory_format) -> None:
    features = pyramid().to(memory_format=layout)
    pixels = torch.arange(size[0] * size[1]).flip(0)
    sample = pixels % 2
    dense = features.hypercolumn(size).flatten(2).permute(0, 2, 1)
    torch.testing.assert_close(features.rows_at(pixels, size, sample), dense[sample, pixels])


def test_rows_of_several_images_need_to_know_the_image() -> None:
    with pytest.raises(ValueError, match="2 images"):
        pyramid(batch=2).rows_at(torch.tensor([0]), (16, 16))


def test_half_precision_maps_are_interpolated_in_float32() -> None:
    half = pyramid(batch=1).to(dtype=torch.bfloat16)
    rows = half.rows_at(torch.arange(64), (8, 8))
    assert rows.dtype == half.hypercolumn((8, 8)).dtype == torch.float32
    torch.testing.assert_close(rows, half.to(dtype=torch.float32).rows_at(torch.arange(64), (8, 8)))


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (6, 10)])
def test_projecting_before_resizing_is_exact(size: tuple[int, int]) -> None:
    """Resizing mixes pixels and projecting mixes channels, so their order does not matter."""
    features = pyramid()
    weight_OC = torch.randn(5, features.num_channels, generator=torch.Generator().manual_seed(2))
    expected = torch.einsum("oc,bchw->bohw", weight_OC, features.hypercolumn(size))
    weights = weight_OC.split(features.channels, dim=1)
    native = [torch.einsum("oc,bchw->bohw", w, m) for w, m in zip(weights, features.maps, strict=True)]
    found = sum(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in native)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_a_crop_equals_the_same_region_of_the_uncropped_hypercolumn(scale: float) -> None:
    features = pyramid()
    rows, columns = (2, 14), (4, 16)
    cropped = features.crop(rows, columns)
    size, full = (int(12 * scale), int(12 * scale)), (int(16 * scale), int(16 * scale))
    top, left = int(rows[0] * scale), int(columns[0] * scale)
    expected = features.hypercolumn(full)[..., top : top + size[0], left : left + size[1]]
    assert torch.equal(cropped.hypercolumn(size), expected)
    pixels = torch.arange(size[0] * size[1])
    read = cropped.rows_at(pixels, size, torch.ones_like(pixels))
    torch.testing.assert_close(read, expected[1].flatten(1).T)


def test_a_crop_knows_its_resolution_and_survives_select_and_to() -> None:
    cropped = pyramid().crop((2, 14), (0, 16))
    assert pyramid().resolution == (16, 16) and cropped.resolution == (12, 16)
    assert cropped.to(dtype=torch.float64).select(1).resolution == (12, 16)
    assert torch.equal(cropped.select(1).hypercolumn((12, 16)), cropped.hypercolumn((12, 16))[1:])


def test_a_second_crop_counts_from_the_first() -> None:
    twice = pyramid().crop((2, 14), (4, 16)).crop((1, 7), (2, 8))
    assert torch.equal(twice.hypercolumn((6, 6)), pyramid().crop((3, 9), (6, 12)).hypercolumn((6, 6)))


def test_a_crop_outside_of_the_image_is_refused() -> None:
    for rows, columns in (((0, 17), (0, 16)), ((-1, 4), (0, 16)), ((4, 4), (0, 16))):
        with pytest.raises(ValueError, match="16 x 16"):
            pyramid().crop(rows, columns)


def test_an_output_that_would_cut_pixels_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        pyramid().crop((4, 16), (0, 16)).hypercolumn((5, 16))


def test_maps_of_different_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="common B"):
        FeaturePyramid((torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4)))
    with pytest.raises(ValueError, match="at least one"):
        FeaturePyramid(())
