"""A user's images and masks: listed, read, mapped to classes, and brought to the generator's size."""

from handsoff_stream.datasets.labelled_images.class_maps import IGNORE_INDEX, ClassMap
from handsoff_stream.datasets.labelled_images.dataset import ImageFolder, LabelledImages, LabelledImagesError
from handsoff_stream.datasets.labelled_images.geometry import Geometry
from handsoff_stream.datasets.labelled_images.listing import list_labelled

__all__ = [
    "IGNORE_INDEX",
    "ClassMap",
    "Geometry",
    "ImageFolder",
    "LabelledImages",
    "LabelledImagesError",
    "list_labelled",
]
