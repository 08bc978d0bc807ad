"""Published sizes of label generators, by domain, task, and number of labelled images.

HandsOff, appendix A.3: the widths that performed best; its Table 4 shows how little they matter. Of keypoints it gives
widths for several thresholds; here are those of PCK-0.1. The published configurations
agree for faces and cars with 50 images. Knows numbers only.
"""

from typing import NamedTuple


class Widths(NamedTuple):
    """(h1, h2) for each number of labelled images that was tried."""

    images_16: tuple[int, int]
    images_50: tuple[int, int]


HIDDEN_WIDTHS = {
    ("faces", "segmentation"): Widths((512, 64), (256, 32)),
    ("faces", "keypoints"): Widths((512, 64), (512, 32)),
    ("cars", "segmentation"): Widths((512, 256), (512, 256)),
    ("full-bodies-8", "segmentation"): Widths((2048, 64), (1024, 32)),
    ("full-bodies-10", "segmentation"): Widths((2048, 128), (2048, 64)),
    ("full-bodies", "keypoints"): Widths((512, 256), (512, 128)),
    ("streets", "segmentation"): Widths((512, 64), (512, 64)),
    ("streets", "depth"): Widths((512, 256), (512, 256)),
}
"""(domain, task) => widths. Full bodies were segmented with 8 and with 10 classes."""


def hidden_widths(domain: str, task: str = "segmentation", *, num_images: int = 50) -> tuple[int, int]:
    """(h1, h2) of a domain and task, for the published number of labelled images (16 or 50) that is nearer.

    Raises:
        ValueError: a domain and task that were not published.
    """
    widths = HIDDEN_WIDTHS.get((domain, task))
    if widths is None:
        known = ", ".join(" ".join(pair) for pair in sorted(HIDDEN_WIDTHS))
        raise ValueError(
            f"no widths were published for {domain!r} and {task!r}; pass one of {known}, or widths of your own"
        )
    return widths.images_16 if num_images < 33 else widths.images_50
