"""The sheet of samples, which users look at before a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.preview import (
    GAP,
    MARGIN,
    OPACITY,
    REJECTED,
    TILE_SIZE,
    heat_map,
    heat_table,
    overlay,
    preview_sheet,
)
from handsoff_stream.stream import HandsOffStream


def test_a_sheet_shows_the_streams_own_samples_in_the_order_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    stream = HandsOffStream(checkpoint, seed=3, device="cpu")
    samples = preview_sheet(checkpoint, tmp_path / "sheet.png", indices=[5, 0], seed=3)
    assert [sample.index for sample in samples] == [5, 0]
    for sample in samples:
        image, label = stream[sample.index]
        levels = torch.from_numpy(sample.image).permute(2, 0, 1).float() / 255
        assert torch.equal(levels, image)
        assert np.array_equal(sample.label, np.asarray(label))


def test_samples_above_the_calibrated_percentile_are_marked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    samples = preview_sheet(checkpoint, path, num=8, columns=8, percentile=50)
    assert checkpoint.calibration is not None
    threshold = np.sort(checkpoint.calibration.scores["top10_mean"])[99]  # of 200 scores, half at or below
    assert [sample.kept for sample in samples] == [sample.score <= threshold for sample in samples]
    assert {sample.kept for sample in samples} == {True, False}
    picture = np.asarray(Image.open(path))
    for i, sample in enumerate(samples):
        corner = picture[MARGIN, MARGIN + i * (TILE_SIZE + GAP)]
        assert (tuple(corner) == REJECTED) == (not sample.kept)


def test_without_calibration_nothing_is_judged(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = replace(checkpoint, calibration=None)
    assert {sample.kept for sample in preview_sheet(bare, tmp_path / "sheet.png", num=3)} == {None}


def test_the_sheet_grows_by_rows_and_enlarges_small_images(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sizes = []
    for num in (2, 4):
        preview_sheet(checkpoint, tmp_path / "sheet.png", num=num, columns=2)
        with Image.open(tmp_path / "sheet.png") as sheet:
            sizes.append(sheet.size)
    (width, one_row), (same_width, two_rows) = sizes
    assert width == same_width == 2 * MARGIN + 2 * TILE_SIZE + GAP
    assert two_rows - one_row > 3 * TILE_SIZE


def test_a_sheet_of_nothing_and_a_checkpoint_without_segmentation_are_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no sheet"):
        preview_sheet(checkpoint, tmp_path / "sheet.png", num=0)
    head = checkpoint.heads["segmentation"]

    class Other:
        config = staticmethod(head.task.config)

    heads = {"other": Head(Other(), head.label_generator)}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other"):
        preview_sheet(replace(checkpoint, heads=heads), tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_more_uncertain_is_always_brighter() -> None:
    table = heat_table().astype(float)
    luminance = table @ [0.2126, 0.7152, 0.0722]
    assert table.shape == (256, 3) and (np.diff(luminance) >= -0.2).all()  # rounding to 8 bits aside
    values = np.array([[0.0, 1.0, 5.0]], dtype=np.float32)
    assert np.array_equal(heat_map(values, top=1.0)[0], heat_table()[[0, 255, 255]])
    assert np.array_equal(heat_map(np.zeros((1, 1), np.float32), top=0.0)[0, 0], heat_table()[0])


def test_an_overlay_blends_each_class_color_over_its_pixels() -> None:
    image = np.full((1, 2, 3), 100, np.uint8)
    blended = overlay(image, np.array([[0, 1]]), ((0, 0, 0), (200, 100, 0)))
    expected = [[100 * (1 - OPACITY)] * 3, [c * OPACITY + 100 * (1 - OPACITY) for c in (200, 100, 0)]]
    assert np.abs(blended[0].astype(float) - expected).max() <= 0.5
