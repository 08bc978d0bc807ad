"""Specks in masks: connected regions too small to be meant.

Knows ids and neighbourhood. Does not know classes.

Shape letters: H W mask size, R runs, E pairs of touching runs.
"""

import numpy as np
from numpy.typing import NDArray


def connected_regions(ids_HW: NDArray[np.integer]) -> NDArray[np.int64]:
    """[H, W] of ids => int64 [H, W] of region numbers from 0: pixels of one id that touch, corners included.

    Runs of one id within a row are united with the touching runs of the row below, under the smallest number, until
    nothing changes.
    """
    starts = np.ones(ids_HW.shape, dtype=bool)
    starts[:, 1:] = ids_HW[:, 1:] != ids_HW[:, :-1]
    run_HW = starts.ravel().cumsum().reshape(ids_HW.shape) - 1
    first_E, second_E = _touching(ids_HW, run_HW)
    region_R = np.arange(run_HW[-1, -1] + 1)
    while True:
        low_E = np.minimum(region_R[first_E], region_R[second_E])
        high_E = np.maximum(region_R[first_E], region_R[second_E])
        if (low_E == high_E).all():
            numbers: NDArray[np.int64] = np.unique(region_R, return_inverse=True)[1][run_HW]
            return numbers
        # Every entry is a root here, and roots only ever point down: there is no cycle.
        np.minimum.at(region_R, high_E, low_E)
        while (region_R[region_R] != region_R).any():
            region_R = region_R[region_R]


def erase_small_regions(ids_HW: NDArray[np.uint8], smallest: int, fill: int) -> NDArray[np.uint8]:
    """A copy in which every connected region of fewer than `smallest` pixels has id `fill`.

    The published code erases, image by image, classes of fewer than 30 pixels in all; each of their regions is
    smaller still, so a `smallest` of 30 erases them too. It makes them background; an unlabelled pixel claims less.
    """
    region_HW = connected_regions(ids_HW)
    too_small = np.bincount(region_HW.ravel()) < smallest
    return np.where(too_small[region_HW], np.uint8(fill), ids_HW)


def _touching(ids_HW: NDArray[np.integer], run_HW: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of runs of one id in neighbouring rows that touch: (upper [E], lower [E])."""
    width = ids_HW.shape[1]
    upper, lower = [], []
    for shift in (-1, 0, 1):
        above = slice(max(0, -shift), width - max(0, shift))
        below = slice(max(0, shift), width - max(0, -shift))
        same = ids_HW[:-1, above] == ids_HW[1:, below]
        upper.append(run_HW[:-1, above][same])
        lower.append(run_HW[1:, below][same])
    upper_E, lower_E = np.concatenate(upper), np.concatenate(lower)
    # Along a row the same pair comes once a pixel; the first one is enough.
    new = (np.diff(upper_E, prepend=-1) != 0) | (np.diff(lower_E, prepend=-1) != 0)
    return upper_E[new], lower_E[new]
