"""Generators: z => w => image and feature maps.

- `base`: the interface of every generator family.
- `families`: the list of the families; each is one file, or one folder.
- `layers`: what the families share.
- `published`: generators from files of any supported format.
"""

from handsoff_stream.generators.base import Generator, Noise, Synthesis
from handsoff_stream.generators.families import FAMILIES
from handsoff_stream.generators.published import load_generator
from handsoff_stream.generators.stylegan1 import StyleGAN1
from handsoff_stream.generators.stylegan2 import StyleGAN2

__all__ = ["FAMILIES", "Generator", "Noise", "StyleGAN1", "StyleGAN2", "Synthesis", "load_generator"]
