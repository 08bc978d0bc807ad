"""The included domain: faces rendered from (seed, index), with exact masks; nothing has to be downloaded."""

from handsoff_stream.datasets.rendered_faces.dataset import LANDMARK_NAMES, RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.datasets.rendered_faces.labels import (
    CLASS_NAMES,
    CLASS_OF_PART,
    FINE_CLASS_NAMES,
    FINE_PALETTE,
    PALETTE,
)

__all__ = [
    "CLASS_NAMES",
    "CLASS_OF_PART",
    "FINE_CLASS_NAMES",
    "FINE_PALETTE",
    "LANDMARK_NAMES",
    "PALETTE",
    "RenderedFaces",
    "labelled_faces",
]
