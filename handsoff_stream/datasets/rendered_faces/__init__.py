"""The embedded domain: faces rendered from (seed, index), with true masks, so that nothing has to be downloaded."""

from handsoff_stream.datasets.rendered_faces.dataset import CLASS_NAMES, LANDMARK_NAMES, PALETTE, RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces

__all__ = ["CLASS_NAMES", "LANDMARK_NAMES", "PALETTE", "RenderedFaces", "labelled_faces"]
