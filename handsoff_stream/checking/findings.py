"""Labels of held-out images => what is known of every class and every image, as numbers.

Four IoUs are compared, each over all held-out images together:

    network                     a segmentation network on the real images: what the labelled images can teach
    network_on_reconstruction   the same network on the reconstructions
    labels                      the label generator on the latents: what the stream labels
    labels_half                 the same, fitted to half as many images

    lost_in_inversion = network - network_on_reconstruction
    lost_in_labelling = network_on_reconstruction - labels           negative: gained
    gained_by_doubling = labels - labels_half

What this does not know: the network was trained on real images, so some of its loss on reconstructions may come from
their look (blur, colors) and not from missing content; the loss in labelling is then larger than it appears. A sample
of a stream has no inversion error, since its image is what the generator drew, so its labels are probably better than
`labels` says. Whether the generator draws everything that real images show is not measured.

Shape letters: N images, K classes, R resamplings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handsoff_stream.checking.cross_validation import HeldOutLabels, Labels
from handsoff_stream.checking.folds import learnable_classes
from handsoff_stream.checking.scores import (
    Counts,
    Estimate,
    Values,
    confusion_matrices,
    iou_of,
    iou_of_each,
    mean_over,
    resampled_iou,
    spread,
)

OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin, 1993)
CLASS_DROP = 0.2  # IoU of a class in one image that counts as lost
IMAGE_DROP = 0.1  # mean IoU of an image that counts as not inverted
NORMAL_MAD = 0.6745  # median absolute deviation of a standard normal distribution


@dataclass(frozen=True)
class ClassFinding:
    """One class. IoUs are in [0, 1], and None for a class that is neither labelled nor predicted."""

    name: str
    images: int
    """Images that show it."""
    pixels: int
    """Labelled pixels in all images."""
    compared: bool
    """Whether images of at least two folds show it, so that it can be learned whichever fold is held out."""
    labels: float | None
    labels_half: float | None
    network: float | None
    """None also without a network, as everything that follows from it."""
    network_on_reconstruction: float | None
    lost_in_inversion: Estimate | None
    lost_in_labelling: Estimate | None
    gained_by_doubling: Estimate | None
    mistaken_for: str | None
    """The class that most of its wrongly labelled pixels are given."""


@dataclass(frozen=True)
class ImageFinding:
    """One image. IoUs are means over the compared classes that its mask shows."""

    name: str
    fold: int
    """The fold in which it was held out, from 0."""
    psnr: float
    """Of its reconstruction, in dB."""
    psnr_is_outlier: bool
    """Whether its modified z-score among all images is below -3.5."""
    labels: float | None
    network: float | None
    network_on_reconstruction: float | None
    lost_classes: tuple[str, ...]
    """Classes whose IoU by the network falls by 0.2 or more from the image to the reconstruction."""
    inverts: bool
    """False if the PSNR is an outlier, or the network's mean IoU falls by 0.1 or more."""


@dataclass(frozen=True)
class Summary:
    """Means over the compared classes."""

    num_images: int
    num_folds: int
    train_images: int
    """Images that each fit sees, rounded over the folds."""
    half_images: int
    """Images that each fit to half of them sees."""
    labels: Estimate
    labels_half: Estimate
    network: Estimate | None
    network_on_reconstruction: Estimate | None
    lost_in_inversion: Estimate | None
    lost_in_labelling: Estimate | None
    behind_network: Estimate | None
    """network - labels."""
    gained_by_doubling: Estimate


@dataclass(frozen=True)
class Findings:
    """All numbers of a check."""

    summary: Summary
    classes: tuple[ClassFinding, ...]
    images: tuple[ImageFinding, ...]


class _Learner:
    """IoUs of one learner, and their resamplings."""

    def __init__(self, labels: Labels, masks_NHW: NDArray[np.integer], num_classes: int, seed: int) -> None:
        self.matrices_NKK: Counts = confusion_matrices(labels, masks_NHW, num_classes)
        self.iou_K: Values = iou_of(self.matrices_NKK)
        self.resampled_RK: Values = resampled_iou(self.matrices_NKK, seed)

    def mean(self, compared_K: NDArray[np.bool_]) -> Estimate:
        """Mean IoU over the compared classes."""
        return Estimate(float(mean_over(self.iou_K, compared_K)), spread(mean_over(self.resampled_RK, compared_K)))


def find(
    held_out: HeldOutLabels,
    masks_NHW: NDArray[np.integer],
    names: Sequence[str],
    class_names: Sequence[str],
    psnr_N: Sequence[float],
    *,
    seed: int,
) -> Findings:
    """Compare labels with masks.

    Args:
        held_out: labels of all images.
        masks_NHW: class ids in [0, K), 255 where unlabelled.
        names: of the N images.
        class_names: of the K classes.
        psnr_N: of the reconstructions, in dB.
        seed: of the resampling.
    """
    num_classes = len(class_names)
    learners = {
        name: _Learner(labels, masks_NHW, num_classes, seed)
        for name in ("labels", "labels_half", "network", "network_on_reconstruction")
        if (labels := getattr(held_out, name)) is not None
    }
    pixels_NK = learners["labels"].matrices_NKK.sum(axis=2)
    compared_K = learnable_classes(pixels_NK > 0, held_out.folds)
    return Findings(
        _summary(held_out, learners, compared_K),
        tuple(_class(k, class_names, learners, pixels_NK, bool(compared_K[k])) for k in range(num_classes)),
        tuple(_images(held_out, learners, pixels_NK, compared_K, names, class_names, psnr_N)),
    )


def _summary(held_out: HeldOutLabels, learners: dict[str, _Learner], compared_K: NDArray[np.bool_]) -> Summary:
    def difference(first: str, second: str) -> Estimate | None:
        if first not in learners or second not in learners:
            return None
        a, b = learners[first], learners[second]
        means_R = mean_over(a.resampled_RK, compared_K) - mean_over(b.resampled_RK, compared_K)
        return Estimate(a.mean(compared_K).value - b.mean(compared_K).value, spread(means_R))

    def mean(name: str) -> Estimate | None:
        return learners[name].mean(compared_K) if name in learners else None

    num_images, num_folds = len(held_out.labels), len(held_out.folds)
    gained = difference("labels", "labels_half")
    assert gained is not None
    return Summary(
        num_images=num_images,
        num_folds=num_folds,
        train_images=round(num_images - num_images / num_folds),
        half_images=round(sum(len(half) for half in held_out.halves) / num_folds),
        labels=learners["labels"].mean(compared_K),
        labels_half=learners["labels_half"].mean(compared_K),
        network=mean("network"),
        network_on_reconstruction=mean("network_on_reconstruction"),
        lost_in_inversion=difference("network", "network_on_reconstruction"),
        lost_in_labelling=difference("network_on_reconstruction", "labels"),
        behind_network=difference("network", "labels"),
        gained_by_doubling=gained,
    )


def _class(
    k: int, class_names: Sequence[str], learners: dict[str, _Learner], pixels_NK: Counts, compared: bool
) -> ClassFinding:
    def iou(name: str) -> float | None:
        return _number(learners[name].iou_K[k]) if name in learners else None

    def difference(first: str, second: str) -> Estimate | None:
        a, b = iou(first), iou(second)
        if a is None or b is None or not compared:
            return None
        error = spread(learners[first].resampled_RK[:, k] - learners[second].resampled_RK[:, k])
        return None if np.isnan(error) else Estimate(a - b, error)

    given_K = learners["labels"].matrices_NKK.sum(axis=0)[k].copy()
    given_K[k] = 0
    return ClassFinding(
        name=class_names[k],
        images=int((pixels_NK[:, k] > 0).sum()),
        pixels=int(pixels_NK[:, k].sum()),
        compared=compared,
        labels=iou("labels"),
        labels_half=iou("labels_half"),
        network=iou("network"),
        network_on_reconstruction=iou("network_on_reconstruction"),
        lost_in_inversion=difference("network", "network_on_reconstruction"),
        lost_in_labelling=difference("network_on_reconstruction", "labels"),
        gained_by_doubling=difference("labels", "labels_half"),
        mistaken_for=class_names[int(given_K.argmax())] if given_K.any() else None,
    )


def _images(
    held_out: HeldOutLabels,
    learners: dict[str, _Learner],
    pixels_NK: Counts,
    compared_K: NDArray[np.bool_],
    names: Sequence[str],
    class_names: Sequence[str],
    psnr_N: Sequence[float],
) -> list[ImageFinding]:
    fold_of = {i: f for f, fold in enumerate(held_out.folds) for i in fold}
    each = {name: iou_of_each(learner.matrices_NKK) for name, learner in learners.items()}
    outlier_N = low_outliers(np.array(psnr_N))
    found = []
    for i, name in enumerate(names):
        shown_K = (pixels_NK[i] > 0) & compared_K
        mean = {learner: _number(float(mean_over(iou_NK[i], shown_K))) for learner, iou_NK in each.items()}
        before, after = mean.get("network"), mean.get("network_on_reconstruction")
        drop = 0.0 if before is None or after is None else before - after
        lost: tuple[str, ...] = ()
        if "network" in each:
            drop_K = each["network"][i] - each["network_on_reconstruction"][i]
            lost = tuple(class_names[int(k)] for k in np.flatnonzero(shown_K & (drop_K >= CLASS_DROP)))
        found.append(
            ImageFinding(
                name=name,
                fold=fold_of[i],
                psnr=float(psnr_N[i]),
                psnr_is_outlier=bool(outlier_N[i]),
                labels=mean["labels"],
                network=before,
                network_on_reconstruction=after,
                lost_classes=lost,
                inverts=not outlier_N[i] and drop < IMAGE_DROP,
            )
        )
    return found


def low_outliers(values_N: Values) -> NDArray[np.bool_]:
    """Values far below the others: a modified z-score below -3.5 (Iglewicz and Hoaglin, 1993); bool [N].

    The score is 0.6745 * (value - median) / (median absolute deviation).
    """
    distance_N = values_N - np.median(values_N)
    deviation = np.median(np.abs(distance_N))
    below_N: NDArray[np.bool_] = NORMAL_MAD * distance_N < -OUTLIER * deviation
    return below_N & (deviation > 0)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
