"""Small regions in masks: connected components of fewer pixels than an annotator would draw on purpose.

Knows ids and connectivity. Does not know classes.

Shape letters: H W mask size, R runs, E pairs of touching runs.
"""

import numpy as np
from numpy.typing import NDArray


def connected_components(ids_HW: NDArray[np.integer]) -> NDArray[np.int64]:
    """[H, W] of ids => int64 [H, W] of component numbers from 0: pixels of one id that touch, at corners too.

    Runs of one id within a row are joined with the touching runs of the row below under the smaller number, until no
    number changes.
    """
    starts = np.ones(ids_HW.shape, dtype=bool)
    starts[:, 1:] = ids_HW[:, 1:] != ids_HW[:, :-1]
    run_HW = starts.ravel().cumsum().reshape(ids_HW.shape) - 1
    first_E, second_E = _touching(ids_HW, run_HW)
    component_R = np.arange(run_HW[-1, -1] + 1)
    while True:
        low_E = np.minimum(component_R[first_E], component_R[second_E])
        high_E = np.maximum(component_R[first_E], component_R[second_E])
        if (low_E == high_E).all():
            numbers: NDArray[np.int64] = np.unique(component_R, return_inverse=True)[1][run_HW]
            return numbers
        # Every entry is a root here, and a root only ever gets a smaller number, so there is no cycle.
        np.minimum.at(component_R, high_E, low_E)
        while (component_R[component_R] != component_R).any():
            component_R = component_R[component_R]


def erase_small_regions(ids_HW: NDArray[np.uint8], smallest: int, fill: int) -> NDArray[np.uint8]:
    """A copy in which every connected component of fewer than `smallest` pixels has id `fill`.

    The published code erases, image by image, the classes of fewer than 30 pixels in all. Each of their components is
    even smaller, so a `smallest` of 30 erases them too. It makes these pixels background; here they can become
    unlabelled, which makes no claim about them.

    Args:
        ids_HW: uint8 [H, W].
        smallest: pixels of the smallest component that stays.
        fill: id of the erased pixels.
    """
    component_HW = connected_components(ids_HW)
    too_small = np.bincount(component_HW.ravel()) < smallest
    return np.where(too_small[component_HW], np.uint8(fill), ids_HW)


def _touching(ids_HW: NDArray[np.integer], run_HW: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of runs of one id in neighboring rows that touch: (upper [E], lower [E])."""
    width = ids_HW.shape[1]
    upper, lower = [], []
    for shift in (-1, 0, 1):
        above = slice(max(0, -shift), width - max(0, shift))
        below = slice(max(0, shift), width - max(0, -shift))
        same = ids_HW[:-1, above] == ids_HW[1:, below]
        upper.append(run_HW[:-1, above][same])
        lower.append(run_HW[1:, below][same])
    upper_E, lower_E = np.concatenate(upper), np.concatenate(lower)
    # Along a row the same pair is found once per pixel; the first one is enough.
    new = (np.diff(upper_E, prepend=-1) != 0) | (np.diff(lower_E, prepend=-1) != 0)
    return upper_E[new], lower_E[new]
