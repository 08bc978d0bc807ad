"""The few labelled images of the embedded domain: what a label generator is fitted on, and what a baseline gets.

Knows which rendered faces those are. Does not know what they are used for.
"""

from handsoff_stream.datasets.rendered_faces.dataset import RenderedFaces, Transforms

GLASSES = HAT = 0.15
"""Probability that a labelled face wears them, three times that of other plain faces."""


def labelled_faces(
    num_images: int = 16,
    *,
    size: int = 128,
    fine: bool = False,
    varied: bool = False,
    transforms: Transforms | None = None,
) -> RenderedFaces:
    """The first `num_images` faces of the train split, glasses and hats over-represented.

    At the natural 5 %, 16 images are likely to show neither, and a class without an example cannot be learned; HandsOff
    (section 4.5) adds images with rare classes to its labelled set for that reason. At 15 % all ten classes occur among
    the first 16 (4 pairs of glasses, 1 hat). Nothing else is chosen.

    Args:
        num_images: how many; a smaller set is a prefix of a larger one.
        size: pixels a side.
        fine: label the parts of the ten classes.
        varied: of the varied faces.
        transforms: called as `transforms(image, mask)`.
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
