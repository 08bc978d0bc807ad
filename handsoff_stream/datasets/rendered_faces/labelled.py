"""The few labelled images of the included domain, on which label generators are fitted and baselines are trained.

Knows which rendered faces they are. Does not know what they are used for.
"""

from handsoff_stream.datasets.rendered_faces.dataset import RenderedFaces, Transforms

GLASSES = HAT = 0.15
"""Probabilities of glasses and of a hat on a labelled face; three times those of other plain faces."""


def labelled_faces(
    num_images: int = 16,
    *,
    size: int = 128,
    fine: bool = False,
    varied: bool = False,
    transforms: Transforms | None = None,
) -> RenderedFaces:
    """The first `num_images` faces of the train split, with glasses and hats on more faces than usual.

    At the natural 5 %, 16 images probably show neither, and a class without an example cannot be learned. HandsOff
    (section 4.5) adds images with rare classes to its labelled set for the same reason. At 15 % all ten classes occur
    among the first 16 images (4 pairs of glasses, 1 hat). Nothing else was selected by hand.

    Args:
        num_images: number of faces; a smaller set is a prefix of a larger one.
        size: height and width in pixels.
        fine: whether to label the parts instead of the ten classes.
        varied: whether the faces are varied ones.
        transforms: called as `transforms(image, mask)`; returns both.

    Returns:
        A dataset of (image float32 [3, H, W] in [0, 1], mask int64 [H, W]).

    Raises:
        ValueError: as `RenderedFaces`.
    """
    return RenderedFaces(
        "train",
        num_images=num_images,
        size=size,
        glasses=GLASSES,
        hat=HAT,
        fine=fine,
        varied=varied,
        transforms=transforms,
    )
