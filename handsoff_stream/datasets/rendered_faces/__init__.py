"""The embedded domain: faces rendered from (seed, index), with true masks, so that nothing has to be downloaded."""

from handsoff_stream.datasets.rendered_faces.dataset import RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces

__all__ = ["RenderedFaces", "labelled_faces"]
