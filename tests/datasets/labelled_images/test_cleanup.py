"""Small connected components become unlabelled, and nothing else changes; a flood fill finds the same components."""

from collections import deque

import numpy as np
import pytest

from handsoff_stream.datasets.labelled_images.cleanup import connected_components, erase_small_regions


def flood_fill(ids: np.ndarray) -> np.ndarray:
    """The obvious way: one region after another, one pixel after another."""
    region = np.full(ids.shape, -1)
    count = 0
    for start in np.ndindex(*ids.shape):
        if region[start] >= 0:
            continue
        region[start], queue = count, deque([start])
        while queue:
            row, column = queue.popleft()
            for near in np.ndindex(3, 3):
                r, c = row + near[0] - 1, column + near[1] - 1
                inside = 0 <= r < ids.shape[0] and 0 <= c < ids.shape[1]
                if inside and region[r, c] < 0 and ids[r, c] == ids[row, column]:
                    region[r, c] = count
                    queue.append((r, c))
        count += 1
    return region


def spiral(size: int) -> np.ndarray:
    """One arm, one pixel wide, of class 1 on class 0: as long a region as there is."""
    ids = np.zeros((size, size), dtype=np.uint8)
    row, column, step = 0, 0, (0, 1)
    ids[0, 0] = 1
    for _ in range(size * size):
        ahead = row + 2 * step[0], column + 2 * step[1]
        near = row + step[0], column + step[1]
        free = all(0 <= x < size for x in near) and not (all(0 <= x < size for x in ahead) and ids[ahead])
        if not free or ids[near]:
            step = (step[1], -step[0])
            near = row + step[0], column + step[1]
            if not all(0 <= x < size for x in near) or ids[near]:
                break
        row, column = near
        ids[row, column] = 1
    return ids


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 23), (40, 31)])
def test_regions_are_those_of_a_flood_fill(classes, shape):
    ids = np.random.default_rng(classes).integers(0, classes, shape, dtype=np.uint8)
    found, expected = connected_components(ids), flood_fill(ids)
    # The same partition: region numbers match one to one.
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(found)) == len(np.unique(expected))
    assert set(np.unique(found)) == set(range(len(pairs)))


def test_a_long_thin_region_is_one():
    ids = spiral(41)
    assert ids.sum() > 500
    assert len(np.unique(connected_components(ids)[ids == 1])) == 1


def test_touching_at_a_corner_is_touching():
    assert connected_components(np.eye(4, dtype=np.uint8)).max() == 1


def test_regions_below_the_smallest_size_are_erased_and_no_others():
    ids = np.zeros((20, 20), dtype=np.uint8)
    ids[0:5, 0:6] = 1  # 30 pixels
    ids[8:13, 0:6] = 2
    ids[12, 5] = 0  # 29
    ids[15:17, 15:17] = 1  # a small component of a class that has a larger one elsewhere
    before = ids.copy()
    cleaned = erase_small_regions(ids, 30, fill=255)
    expected = ids.copy()
    expected[ids == 2] = 255
    expected[15:17, 15:17] = 255
    assert np.array_equal(cleaned, expected) and cleaned.dtype == np.uint8
    assert np.array_equal(ids, before)


def test_a_class_of_fewer_pixels_in_all_goes_as_in_the_published_code():
    ids = np.random.default_rng(0).choice(3, (64, 64), p=[0.97, 0.025, 0.005]).astype(np.uint8)
    rare = int((ids == 2).sum())
    assert 0 < rare < 30
    assert not (erase_small_regions(ids, 30, fill=255) == 2).any()
