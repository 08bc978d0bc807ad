"""What follows from the numbers of a check, in sentences.

A difference is named if it is at least 0.1 and two standard errors; otherwise it is said to be unclear. Knows findings.
Does not know how they were computed, or where the sentences are shown.
"""

from collections.abc import Sequence

from handsoff_stream.checking.findings import ClassFinding, Findings, ImageFinding, Summary
from handsoff_stream.checking.scores import Estimate

NAMED = 0.1  # difference of IoU
UNLEARNED = 0.2  # IoU


def signed(estimate: Estimate) -> str:
    """Such as "+0.14 ± 0.05"; the second number is the standard error."""
    return f"{estimate.value:+.2f} ± {estimate.standard_error:.2f}"


def plain(estimate: Estimate) -> str:
    """Such as "0.63 ± 0.04"."""
    return f"{estimate.value:.2f} ± {estimate.standard_error:.2f}"


def verdict(findings: Findings) -> tuple[str, ...]:
    """What a user should know first: how good the labels are, compared with what, and where the rest is lost."""
    summary = findings.summary
    compared = sum(c.compared for c in findings.classes)
    sentences = [
        f"On images that were held out, the label generator reaches a mean IoU of {plain(summary.labels)} over "
        f"{compared} of {len(findings.classes)} classes, fitted to {summary.train_images} of the "
        f"{summary.num_images} labelled images at a time."
    ]
    sentences += _beside_the_network(summary)
    sentences += _lost(findings.classes)
    broken = [image.name for image in findings.images if not image.inverts]
    if broken:
        sentences.append(f"{len(broken)} of {summary.num_images} images do not invert.")
    sentences.append(_more_labels(summary))
    return tuple(sentences)


def _beside_the_network(summary: Summary) -> list[str]:
    network, behind = summary.network, summary.behind_network
    inversion, labelling = summary.lost_in_inversion, summary.lost_in_labelling
    if network is None or behind is None or inversion is None or labelling is None:
        return [
            "No segmentation network was trained for comparison, so it is not known what these images could teach, or "
            "whether the rest is lost in inversion or in labelling."
        ]
    start = f"A segmentation network trained on the same images reaches {plain(network)} on the same held-out images"
    if not behind.is_clear:
        said = (
            f"{start}; the difference of {signed(behind)} is within the noise of so few images. Mix the stream with "
            "the labelled images, and compare both on test images of your own."
        )
    elif behind.value > 0:
        said = f"{start}, {behind.value:.2f} more: mix the stream with the labelled images, do not replace them."
    else:
        said = (
            f"{start}, {-behind.value:.2f} less: the labels of the stream know more than the network learned, so the "
            "stream is worth training on. Mix the labelled images in all the same."
        )
    return [
        said,
        f"Mean loss in inversion: {signed(inversion)}, from the network's IoU on the images to its IoU on their "
        f"reconstructions. Mean loss in labelling: {signed(labelling)}, from there to the label generator.",
    ]


def _lost(classes: Sequence[ClassFinding]) -> list[str]:
    kinds = {
        "lost in inversion": [c.name for c in classes if _is_loss(c.lost_in_inversion)],
        "lost in labelling": [c.name for c in classes if _is_loss(c.lost_in_labelling)],
        "shown by too few images to be checked": [c.name for c in classes if c.images and not c.compared],
        "shown by no image": [c.name for c in classes if not c.images],
    }
    return [f"Classes {kind}: {', '.join(names)}." for kind, names in kinds.items() if names]


def _more_labels(summary: Summary) -> str:
    gained = summary.gained_by_doubling
    said = f"With {summary.half_images} images instead of {summary.train_images}, the label generator reaches "
    said += f"{plain(summary.labels_half)}"
    if not gained.is_clear:
        return f"{said}: a difference of {signed(gained)}, within the noise of so few images."
    if gained.value > 0:
        return f"{said}, {gained.value:.2f} less: more labelled images will probably help further."
    return f"{said}, {-gained.value:.2f} more: more images of the same kind will probably not help."


def class_sentence(found: ClassFinding, summary: Summary) -> str:
    """What happens to one class, and where."""
    if found.images == 0:
        return "No labelled image shows it, so the stream will never label it."
    if not found.compared:
        shown = f"Shown by {found.images} of {summary.num_images} images"
        where = " only" if found.images == 1 else ", all in one fold"
        return f"{shown}{where}, so it was never seen in training when it was to be labelled; label more that show it."
    as_what = f" Its wrong pixels are mostly labelled {found.mistaken_for}." if found.mistaken_for else ""
    if found.network is None or found.network_on_reconstruction is None or found.labels is None:
        return f"IoU {found.labels or 0:.2f}.{as_what}"
    losses = []
    if _is_loss(found.lost_in_inversion):
        losses.append(
            f"lost in inversion: the network finds {found.network:.2f} on the images and "
            f"{found.network_on_reconstruction:.2f} on their reconstructions"
        )
    if _is_loss(found.lost_in_labelling):
        losses.append(
            f"lost in labelling: the network finds {found.network_on_reconstruction:.2f} on the reconstructions, the "
            f"label generator {found.labels:.2f}"
        )
    if losses:
        said = "; ".join(losses)
        return f"{said[:1].upper()}{said[1:]}.{as_what}"
    if max(found.network, found.labels) < UNLEARNED:
        return f"Not learned from these images, by the network either.{as_what}"
    differences = [d for d in (found.lost_in_inversion, found.lost_in_labelling) if d is not None]
    if any(d.value >= NAMED for d in differences):
        return "Perhaps lost, but too few images show it to be certain where."
    if any(d.is_clear and d.value <= -NAMED for d in differences) and found.labels > found.network:
        return f"The label generator finds more than the network: {found.labels:.2f} against {found.network:.2f}."
    return "Kept."


def advice(findings: Findings) -> tuple[str, ...]:
    """One sentence per class on what more labels would do, the most promising classes first."""
    order = sorted(findings.classes, key=_promise, reverse=True)
    helpful = [c for c in order if _is_gain(c.gained_by_doubling)]
    first = helpful[0].name if helpful else None
    return tuple(_advice(c, findings.summary, is_first=c.name == first) for c in order)


def _advice(found: ClassFinding, summary: Summary, *, is_first: bool) -> str:
    shown = f"{found.name}: shown by {found.images} of {summary.num_images} images"
    gained = found.gained_by_doubling
    if not found.compared or gained is None or found.labels is None or found.labels_half is None:
        return f"{shown}; label at least 4 that show it, so that it can be learned and checked."
    measured = (
        f"{shown}; IoU {found.labels_half:.2f} with {summary.half_images} labelled images, {found.labels:.2f} with "
        f"{summary.train_images} ({signed(gained)})"
    )
    is_lost = _is_loss(found.lost_in_inversion)
    if _is_gain(gained):
        more = "more labelled images" if found.images == summary.num_images else "more images that show it"
        limit = ", apart from what is lost in inversion" if is_lost else ""
        return f"{measured}: {more} will help{' most' if is_first else ''}{limit}."
    if is_lost:
        return f"{measured}: it is lost in inversion, which more labels do not mend."
    if not gained.is_clear:
        return f"{measured}: no gain beyond the noise."
    return f"{measured}: {'more images did not help' if gained.value < 0 else 'little to gain'}."


def image_sentence(found: ImageFinding) -> str:
    """Why an image does not invert; empty if it does."""
    if found.inverts:
        return ""
    reasons = [f"its PSNR of {found.psnr:.1f} dB is far below the others'"] if found.psnr_is_outlier else []
    before, after = found.network, found.network_on_reconstruction
    if before is not None and after is not None and before > after:
        reasons.append(f"the network's mean IoU falls from {before:.2f} to {after:.2f} on its reconstruction")
    lost = f"; lost: {', '.join(found.lost_classes)}" if found.lost_classes else ""
    return f"{found.name}: {' and '.join(reasons)}{lost}."


def _promise(found: ClassFinding) -> tuple[bool, bool, float]:
    gained = found.gained_by_doubling
    return _is_gain(gained), not found.compared, 0.0 if gained is None else gained.value


def _is_loss(difference: Estimate | None) -> bool:
    return difference is not None and difference.is_clear and difference.value >= NAMED


def _is_gain(difference: Estimate | None) -> bool:
    return difference is not None and difference.is_clear and difference.value >= NAMED / 2
