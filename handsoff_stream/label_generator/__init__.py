"""The label generator: an ensemble of small MLPs that maps the hypercolumn of a pixel to outputs.

- `ensemble`: the trainable ensemble, with a slow reference path for whole images.
- `folded`: the same function on whole images, fast.
- `tiles`, `rows`, `products`: the geometry, the feature access and the matrix products of `folded`.
- `triton_head`: its last layers and the votes as one CUDA kernel.

It knows the number of outputs. It does not know which task they serve.
"""

from handsoff_stream.label_generator.ensemble import LabelGenerator
from handsoff_stream.label_generator.folded import FoldedLabelGenerator, JoinedLabelGenerators, join

__all__ = ["FoldedLabelGenerator", "JoinedLabelGenerators", "LabelGenerator", "join"]
