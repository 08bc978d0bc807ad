"""Where a class is lost, on labels that were made so that the answer is known."""

import numpy as np
import pytest

from handsoff_stream.checking.cross_validation import HeldOutLabels
from handsoff_stream.checking.findings import find, low_outliers
from handsoff_stream.checking.words import advice, class_sentence, image_sentence, verdict

CLASSES = ("ground", "kept", "uninvertible", "unlabellable", "scarce", "single", "absent")
GROUND, KEPT, UNINVERTIBLE, UNLABELLABLE, SCARCE, SINGLE, ABSENT = range(7)
NAMES = tuple(f"image {i}" for i in range(8))


@pytest.fixture(scope="module")
def masks():
    """8 images of 32 x 8: ground, and one row each of four classes; a single image has a row of another class."""
    masks = np.zeros((8, 32, 8), dtype=np.int64)
    for row, class_id in ((0, KEPT), (2, UNINVERTIBLE), (4, UNLABELLABLE), (6, SCARCE)):
        masks[:, row] = class_id
    masks[3, 7] = SINGLE
    masks[:, 1, 0] = 255
    return masks


@pytest.fixture(scope="module")
def labels(masks):
    """The network knows all but what is single; inversion loses one class, labelling another; half loses a third."""
    labelled = np.where(masks == 255, 0, masks).astype(np.uint8)

    def without(*classes):
        return np.where(np.isin(labelled, classes), GROUND, labelled).astype(np.uint8)

    return HeldOutLabels(
        folds=((0, 4), (1, 5), (2, 6), (3, 7)),
        halves=((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)),
        labels=without(SINGLE, UNINVERTIBLE, UNLABELLABLE),
        labels_half=without(SINGLE, UNINVERTIBLE, UNLABELLABLE, SCARCE),
        network=without(SINGLE),
        network_on_reconstruction=without(SINGLE, UNINVERTIBLE),
    )


@pytest.fixture(scope="module")
def findings(labels, masks):
    return find(labels, masks, NAMES, CLASSES, [20.0, 21.0, 20.5, 20.2, 20.4, 20.1, 20.3, 5.0], seed=0)


def test_every_class_is_lost_where_it_is_lost(findings):
    classes = {found.name: found for found in findings.classes}
    where = {name: (c.lost_in_inversion, c.lost_in_labelling) for name, c in classes.items() if c.compared}
    assert [d.value for d in where["kept"]] == [0, 0]
    assert [d.value for d in where["uninvertible"]] == [1, 0]
    assert [d.value for d in where["unlabellable"]] == [0, 1]
    assert classes["scarce"].gained_by_doubling.value == 1 and classes["kept"].gained_by_doubling.value == 0
    assert classes["unlabellable"].mistaken_for == "ground" and classes["kept"].mistaken_for is None


def test_counts_are_those_of_the_masks(findings, masks):
    for k, found in enumerate(findings.classes):
        assert found.pixels == (masks == k).sum()
        assert found.images == (masks == k).any(axis=(1, 2)).sum()


def test_classes_that_cannot_be_checked_stay_out_of_the_means(findings):
    compared = [found.name for found in findings.classes if found.compared]
    assert compared == ["ground", "kept", "uninvertible", "unlabellable", "scarce"]
    ground = findings.classes[GROUND].labels
    assert findings.summary.labels.value == pytest.approx((ground + 1 + 0 + 0 + 1) / 5)
    absent, single = findings.classes[ABSENT], findings.classes[SINGLE]
    assert absent.labels is None and absent.images == 0
    assert single.labels == 0 and single.lost_in_labelling is None


def test_the_differences_add_up(findings):
    summary = findings.summary
    total = summary.lost_in_inversion.value + summary.lost_in_labelling.value
    assert summary.behind_network.value == pytest.approx(total)
    assert summary.behind_network.value == pytest.approx(summary.network.value - summary.labels.value)


def test_images_are_scored_on_the_classes_that_they_show(findings):
    image = findings.images[0]
    assert image.fold == 0 and image.network == 1 and image.lost_classes == ("uninvertible",)
    assert not image.inverts
    assert [found.psnr_is_outlier for found in findings.images] == [False] * 7 + [True]


def test_without_a_network_nothing_is_attributed(labels, masks):
    alone = HeldOutLabels(labels.folds, labels.halves, labels.labels, labels.labels_half, None, None)
    findings = find(alone, masks, NAMES, CLASSES, [20.0] * 8, seed=0)
    assert findings.summary.network is None and findings.summary.behind_network is None
    assert all(found.lost_in_inversion is None and found.network is None for found in findings.classes)
    assert all(found.inverts for found in findings.images)
    assert "not known" in " ".join(verdict(findings))
    assert class_sentence(findings.classes[UNLABELLABLE], findings.summary) == (
        "IoU 0.00. Its wrong pixels are mostly labelled ground."
    )


def test_outliers_are_far_below_and_not_above():
    assert low_outliers(np.array([20.0, 21, 22, 23, 24, 5, 60])).tolist() == [False] * 5 + [True, False]
    assert not low_outliers(np.array([20.0, 20, 20, 5])).any()  # no deviation to measure with


# Sentences -----------------------------------------------------------------------------------------------------------


def test_the_verdict_says_how_good_what_is_lost_and_what_to_do(findings):
    said = " ".join(verdict(findings))
    for part in (
        "a mean IoU of 0.59",
        "over 5 of 7 classes, fitted to 6 of the 8 labelled images at a time",
        "mix the stream with the labelled images, do not replace them",
        "Classes lost in inversion: uninvertible.",
        "Classes lost in labelling: unlabellable.",
        "Classes shown by too few images to be checked: single.",
        "Classes shown by no image: absent.",
        "8 of 8 images do not invert.",
        "more labelled images will probably help further",
    ):
        assert part in said, part


def test_a_difference_within_the_noise_is_no_verdict(masks):
    """Every second image is labelled worse by one learner, every other one by the other: nothing follows."""
    good = np.where(masks == 255, 0, masks).astype(np.uint8)
    bad = np.where(good == KEPT, GROUND, good).astype(np.uint8)
    odd = np.arange(8)[:, None, None] % 2 == 1
    one, other = np.where(odd, good, bad), np.where(odd, bad, good)
    labels = HeldOutLabels(((0, 4), (1, 5), (2, 6), (3, 7)), ((1, 2, 3),) * 4, one, other, other, other)
    said = " ".join(verdict(find(labels, masks, NAMES, CLASSES, [20.0] * 8, seed=0)))
    assert said.count("within the noise of so few images") == 2
    assert "do not replace" not in said and "worth training" not in said


def test_sentences_of_classes(findings):
    said = {c.name: class_sentence(c, findings.summary) for c in findings.classes}
    assert said["kept"] == "Kept."
    assert said["uninvertible"].startswith("Lost in inversion: the network finds 1.00 on the images and 0.00 on their")
    assert said["unlabellable"].startswith("Lost in labelling: the network finds 1.00 on the reconstructions")
    assert said["single"].startswith("Shown by 1 of 8 images only, so it was never seen in training")
    assert said["absent"] == "No labelled image shows it, so the stream will never label it."


def test_advice_begins_with_the_class_that_gains_most(findings):
    said = advice(findings)
    assert said[0] == (
        "scarce: shown by 8 of 8 images; IoU 0.00 with 3 labelled images, 1.00 with 6 (+1.00 ± 0.00): more labelled "
        "images will help most."
    )
    assert said[1] == (
        "single: shown by 1 of 8 images; label at least 4 that show it, so that it can be learned and checked."
    )
    assert len(said) == len(CLASSES)
    lost = next(sentence for sentence in said if sentence.startswith("uninvertible"))
    assert lost.endswith(": it is lost in inversion, which more labels do not mend.")


def test_an_image_that_does_not_invert_is_named_with_what_it_loses(findings):
    said = image_sentence(findings.images[7])
    assert said.startswith("image 7: its PSNR of 5.0 dB is far below the others' and the network's mean IoU falls from")
    assert said.endswith("; lost: uninvertible.")
