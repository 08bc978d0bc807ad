"""StyleGAN2: the network from the paper (`network`), and the same synthesis with prepared weights (`folded`)."""

from handsoff_stream.generators.stylegan2.network import StyleGAN2

__all__ = ["StyleGAN2"]
