"""Counting labels: by hand, and against torchmetrics."""

import numpy as np
import pytest
import torch

from handsoff_stream.checking.scores import (
    NUM_RESAMPLINGS,
    Estimate,
    confusion_matrices,
    iou_of,
    iou_of_each,
    mean_over,
    resampled_iou,
    spread,
)
from handsoff_stream.downstream import SegmentationMeter


@pytest.fixture(scope="module")
def pair():
    """Labels and masks of 5 images with 4 classes, of which the last is neither labelled nor predicted."""
    random = np.random.default_rng(0)
    masks = random.choice([0, 1, 2, 255], size=(5, 6, 7), p=[0.6, 0.2, 0.1, 0.1])
    labels = np.where(random.random(masks.shape) < 0.6, masks, random.integers(0, 3, masks.shape))
    return np.where(labels == 255, 0, labels).astype(np.uint8), masks


def test_a_confusion_matrix_counts_labelled_pixels_by_true_and_predicted_class():
    predicted, mask = np.array([[[0, 1, 1], [2, 2, 0]]]), np.array([[[0, 0, 1], [2, 255, 2]]])
    assert confusion_matrices(predicted, mask, 3).tolist() == [[[1, 1, 0], [0, 1, 0], [1, 0, 1]]]
    assert iou_of(confusion_matrices(predicted, mask, 3)).tolist() == [1 / 3, 1 / 2, 1 / 2]


def test_ious_are_those_of_torchmetrics(pair):
    labels, masks = pair
    meter = SegmentationMeter("abcd")
    meter.update(torch.from_numpy(labels).long(), torch.from_numpy(masks))
    matrices = confusion_matrices(labels, masks, 4)
    assert np.isnan(iou_of(matrices)[3])
    np.testing.assert_allclose(iou_of(matrices), meter.compute().iou_per_class, rtol=1e-6)
    assert mean_over(iou_of(matrices), np.full(4, True)) == pytest.approx(meter.compute().miou)
    for i in range(len(masks)):
        np.testing.assert_array_equal(iou_of_each(matrices)[i], iou_of(matrices[i : i + 1]))


def test_a_resampling_is_the_iou_of_the_images_that_were_drawn(pair):
    matrices = confusion_matrices(*pair, 4)
    random = np.random.default_rng(7)
    resampled = resampled_iou(matrices, 7)
    counts = random.multinomial(5, [0.2] * 5, size=NUM_RESAMPLINGS)
    for r in range(0, NUM_RESAMPLINGS, 97):
        drawn = np.repeat(np.arange(5), counts[r])
        np.testing.assert_array_equal(resampled[r], iou_of(matrices[drawn]))


def test_the_spread_of_equal_images_is_zero_and_that_of_different_ones_is_not(pair):
    matrices = confusion_matrices(*pair, 4)
    assert spread(resampled_iou(np.repeat(matrices[:1], 5, axis=0), 0)[:, 0]) == pytest.approx(0, abs=1e-12)
    assert spread(resampled_iou(matrices, 0)[:, 0]) > 0.01
    assert np.isnan(spread(np.full(3, np.nan)))


def test_the_standard_error_is_that_of_a_mean_of_independent_images():
    """Images with one pixel each: the IoU of a class that is never predicted wrongly is a share of right pixels."""
    right = np.arange(40) % 4 > 0
    matrices = confusion_matrices(np.where(right, 1, 0)[:, None, None], np.ones((40, 1, 1), dtype=int), 2)
    assert spread(resampled_iou(matrices, 0)[:, 1]) == pytest.approx(np.sqrt(0.75 * 0.25 / 40), rel=0.08)


@pytest.mark.parametrize(("value", "error", "is_clear"), [(0.2, 0.1, True), (-0.2, 0.1, True), (0.2, 0.11, False)])
def test_a_difference_of_two_standard_errors_is_clear(value, error, is_clear):
    assert Estimate(value, error).is_clear == is_clear
