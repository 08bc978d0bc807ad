"""A user's images and masks: listed, read, mapped to classes, and brought to the generator's size."""

from handsoff_stream.datasets.labelled_images.class_maps import ClassMap
from handsoff_stream.datasets.labelled_images.dataset import LabelledImages, LabelledImagesError, UnlabelledImages
from handsoff_stream.datasets.labelled_images.geometry import Geometry
from handsoff_stream.datasets.labelled_images.listing import list_labelled

__all__ = [
    "ClassMap",
    "Geometry",
    "LabelledImages",
    "LabelledImagesError",
    "UnlabelledImages",
    "list_labelled",
]
