"""Samples of a generator, whose latents are known, as what an encoder learns from.

Knows which samples a training step sees, and the error of the encoder's latents on them. Does not know real images or
optimizers.

Shape letters: B batch, L number of style inputs, D latent size, H W image size.
"""

import torch
from torch import Tensor

from handsoff_stream.fitting.encoder.backbones import StyleEncoder
from handsoff_stream.fitting.encoder.restyle import begin, next_latents, resize_generated
from handsoff_stream.generators import Generator
from handsoff_stream.seeding import latents

DEVIATION_SAMPLES = 4096


@torch.no_grad()
def latent_deviation(generator: Generator, seed: int) -> Tensor:
    """Standard deviation of each number of w over `DEVIATION_SAMPLES` samples, float32 [D]."""
    z_BD = latents(seed, range(DEVIATION_SAMPLES), generator.z_dim).to(generator.w_avg)
    return generator.mapping(z_BD).std(dim=0)


@torch.no_grad()
def known_samples(generator: Generator, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """The samples of a training step, which depend on (seed, step) only: no two steps share a sample.

    Returns:
        w, float32 [count, D], not truncated, and the images float32 [count, 3, H, W] in [0, 1], with the generator's
        own noise maps.
    """
    z_BD = latents(seed, range(step * count, (step + 1) * count), generator.z_dim).to(generator.w_avg)
    w_BD = generator.mapping(z_BD)
    made_BCHW = generator.synthesis(generator.truncate(w_BD), "const").images
    return w_BD, made_BCHW.add(1).div(2).clamp(0, 1)


def latent_error(encoder: StyleEncoder, generator: Generator, w_BD: Tensor, images_BCHW: Tensor) -> Tensor:
    """How far the encoder's latents are from the known ones, with gradients to the encoder; a scalar.

    Args:
        encoder: has `latent_std`, on the generator's device.
        generator: see `restyle.encode`.
        w_BD: float32 [B, D], which the images were made from.
        images_BCHW: float32 [B, 3, H, W] in [0, 1].

    Returns:
        Mean over passes, samples, style inputs and numbers of ((w_e - w) / standard deviation of w)^2.
    """
    w_plus_BLD, shown_BCHW, target_BCHW = begin(encoder, generator, images_BCHW)
    passes = encoder.config.iterations
    total = torch.zeros((), device=w_BD.device)
    for number in range(passes):
        w_plus_BLD = next_latents(encoder, w_plus_BLD, shown_BCHW, target_BCHW)
        total = total + ((w_plus_BLD - w_BD[:, None]) / encoder.latent_std).square().mean() / passes
        if number + 1 < passes:
            w_plus_BLD = w_plus_BLD.detach()
            with torch.no_grad():
                shown_BCHW = resize_generated(encoder, generator.synthesis(w_plus_BLD, "const").images)
    return total
