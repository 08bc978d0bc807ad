"""The label generator: an ensemble of small MLPs from a pixel's hypercolumn to outputs.

`ensemble` trains it and holds the slow reference path, `folded` runs the same function on whole images, `rows`, `tiles`
and `products` are its parts, `triton_head` is its last layers as one CUDA kernel. It sees a number of outputs, and does
not know which task they serve.
"""

from handsoff_stream.label_generator.ensemble import LabelGenerator
from handsoff_stream.label_generator.folded import FoldedLabelGenerator, JoinedLabelGenerators, join

__all__ = ["FoldedLabelGenerator", "JoinedLabelGenerators", "LabelGenerator", "join"]
