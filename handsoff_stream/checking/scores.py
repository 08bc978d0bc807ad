"""Predicted labels and masks => IoU of each class, and how much it depends on which images were labelled.

Everything is computed from one confusion matrix for each image, so any set of images can be scored afterwards. Knows
class ids. Does not know what predicted the labels.

Shape letters: N images, K classes, R resamplings, H W label size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handsoff_stream.class_ids import IGNORE_INDEX

Counts = NDArray[np.int64]
Values = NDArray[np.float64]
NUM_RESAMPLINGS = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float
    """Of resampling the images (bootstrap). It holds the choice of the images, and not the randomness of a training."""

    @property
    def is_clear(self) -> bool:
        """Whether the number is at least two standard errors away from 0."""
        return abs(self.value) >= 2 * self.standard_error


def confusion_matrices(predicted_NHW: NDArray[np.integer], masks_NHW: NDArray[np.integer], num_classes: int) -> Counts:
    """Labelled pixels of each image by true class and predicted class, int64 [N, K, K].

    Args:
        predicted_NHW: class ids in [0, K).
        masks_NHW: class ids in [0, K), and 255 where unlabelled.
        num_classes: K.
    """
    matrices = []
    for predicted_HW, mask_HW in zip(predicted_NHW, masks_NHW, strict=True):
        labelled = mask_HW != IGNORE_INDEX
        cells = mask_HW[labelled].astype(np.int64) * num_classes + predicted_HW[labelled]
        matrices.append(np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes))
    return np.stack(matrices)


def iou_of(matrices_NKK: Counts) -> Values:
    """IoU of each class over all images together, float64 [K]; NaN for a class neither labelled nor predicted."""
    return _ratio(*(counts_NK.sum(axis=0) for counts_NK in _intersection_and_union(matrices_NKK)))


def iou_of_each(matrices_NKK: Counts) -> Values:
    """IoU of each class in each image, float64 [N, K]; NaN for a class neither labelled nor predicted there."""
    return _ratio(*_intersection_and_union(matrices_NKK))


def resampled_iou(matrices_NKK: Counts, seed: int) -> Values:
    """IoU of each class over sets of N images that are drawn from the N with replacement, float64 [R, K].

    The same seed draws the same images, so two results can be subtracted (a paired bootstrap).
    """
    num_images = len(matrices_NKK)
    random = np.random.default_rng(seed)
    drawn_RN = random.multinomial(num_images, np.full(num_images, 1 / num_images), size=NUM_RESAMPLINGS)
    return _ratio(*(drawn_RN @ counts_NK for counts_NK in _intersection_and_union(matrices_NKK)))


def mean_over(values: Values, classes_K: NDArray[np.bool_]) -> Values:
    """Mean over some classes of [..., K], without NaN; NaN where no class is left."""
    chosen = values[..., classes_K]
    there = ~np.isnan(chosen)
    return _ratio(np.where(there, chosen, 0).sum(axis=-1), there.sum(axis=-1))


def spread(values_R: Values) -> float:
    """Standard deviation of the values that are not NaN; NaN if fewer than two are left."""
    there = values_R[~np.isnan(values_R)]
    return float(there.std(ddof=1)) if len(there) > 1 else float("nan")


def _intersection_and_union(matrices_NKK: Counts) -> tuple[Counts, Counts]:
    intersection_NK = np.diagonal(matrices_NKK, axis1=1, axis2=2)
    return intersection_NK, matrices_NKK.sum(axis=1) + matrices_NKK.sum(axis=2) - intersection_NK


def _ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> Values:
    ratio = np.full(np.shape(part), np.nan)
    np.divide(part, whole, out=ratio, where=np.asarray(whole) != 0)
    return ratio
