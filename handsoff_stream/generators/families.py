"""The generator families by name. A new family is one file or one folder, and one entry here."""

from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.stylegan1 import StyleGAN1
from handsoff_stream.generators.stylegan2 import StyleGAN2

FAMILIES: dict[str, type[Generator]] = {family.family: family for family in (StyleGAN1, StyleGAN2)}
"""Class by the name that checkpoints record, `Generator.family`."""
