"""Which labelled images are held out together.

Knows which image shows which class. Does not know pixels, latents or networks.

Shape letters: N images, K classes, F folds.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def stratified_folds(shown_NK: NDArray[np.bool_], num_folds: int, seed: int) -> list[list[int]]:
    """Divide images into folds, so that the images of every rare class are spread over as many folds as possible.

    Images are placed one after the other, those with the rarest classes first. Each goes to the fold with the fewest
    images of its rarest class; ties are resolved by its other classes, then by the sizes of the folds. This is the idea
    of iterative stratification (Sechidis et al., ECML PKDD 2011) with folds of fixed sizes.

    Args:
        shown_NK: whether each image shows each class.
        num_folds: F, from 2 to N.
        seed: of the order of images that are equally rare.

    Returns:
        The images of each fold, ascending. Every image is in one fold, and sizes differ by at most 1. The folds differ
        by at most one image in the number of images of the rarest class.

    Raises:
        ValueError: fewer than 2 folds, or more folds than images.
    """
    num_images, num_classes = shown_NK.shape
    if not 2 <= num_folds <= num_images:
        raise ValueError(
            f"{num_images} images cannot be divided into {num_folds} folds; pass at least 2 folds, and at most one for "
            "each image"
        )
    total_K = shown_NK.sum(axis=0)
    rarity_NK = np.where(shown_NK, total_K, num_images + 1)
    rarest_N = rarity_NK.argmin(axis=1)
    shuffled = np.random.default_rng(seed).permutation(num_images)
    order = sorted(shuffled.tolist(), key=lambda i: (rarity_NK[i].min(), rarest_N[i]))
    capacity_F = np.full(num_folds, num_images // num_folds)
    capacity_F[: num_images % num_folds] += 1
    count_FK = np.zeros((num_folds, num_classes), dtype=np.int64)
    folds: list[list[int]] = [[] for _ in range(num_folds)]
    for i in order:
        crowded_F = (count_FK[:, shown_NK[i]] / total_K[shown_NK[i]]).sum(axis=1)
        free = [f for f in range(num_folds) if len(folds[f]) < capacity_F[f]]
        chosen = min(free, key=lambda f: (count_FK[f, rarest_N[i]], crowded_F[f], len(folds[f]) - capacity_F[f]))
        folds[chosen].append(i)
        count_FK[chosen] += shown_NK[i]
    return [sorted(fold) for fold in folds]


def nested_half(images: Sequence[int], shown_NK: NDArray[np.bool_], seed: int) -> list[int]:
    """Half of some images, ascending, with about half of the images of every class; the larger half of an odd number.

    Args:
        images: at least 2, as positions in `shown_NK`.
        shown_NK: whether each image shows each class.
        seed: of the division.
    """
    images = sorted(images)
    return [images[i] for i in stratified_folds(shown_NK[images], 2, seed)[0]]


def learnable_classes(shown_NK: NDArray[np.bool_], folds: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Whether every class is shown by images of two folds or more, bool [K].

    The other classes are never seen in training while an image that shows them is held out.
    """
    in_fold_FK = np.stack([shown_NK[list(fold)].any(axis=0) for fold in folds])
    learnable_K: NDArray[np.bool_] = in_fold_FK.sum(axis=0) >= 2
    return learnable_K
