"""Shelf 1: generators, one family per file. A new family is one file and one line in `FAMILIES`."""

from handsoff_stream.generators.base import Generator, Noise, Synthesis
from handsoff_stream.generators.stylegan1 import StyleGAN1
from handsoff_stream.generators.stylegan2 import StyleGAN2

FAMILIES: dict[str, type[Generator]] = {family.family: family for family in (StyleGAN1, StyleGAN2)}

from handsoff_stream.generators.checkpoints import load_generator  # noqa: E402  (adapters need FAMILIES)

__all__ = ["FAMILIES", "Generator", "Noise", "StyleGAN1", "StyleGAN2", "Synthesis", "load_generator"]
