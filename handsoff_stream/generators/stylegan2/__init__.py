"""StyleGAN2: the trainable network (`network`, `style_layers`), and its synthesis with prepared weights (`folded`)."""

from handsoff_stream.generators.stylegan2.network import StyleGAN2

__all__ = ["StyleGAN2"]
