"""The settings of a training run, and the networks and optimizers that it begins with.

Knows sizes, learning rates, and how networks grow from one stage to the next. Does not know losses, images or files.
"""

from dataclasses import dataclass
from typing import Any

import torch

from handsoff_stream.generators import StyleGAN2
from recipes.faces.discriminator import Discriminator, Encoder
from recipes.faces.discriminator import grow as grow_discriminator
from recipes.faces.projected import ProjectedHeads


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, recorded in its state. A resumed run uses the settings that it is resumed with."""

    data: str | None
    stages: tuple[tuple[int, int], ...]
    """(resolution, train until this many images) in growing order."""
    batch: int
    channels: tuple[int, ...]
    """Channels at 4x4, 8x8, ... of the last stage; the discriminator has the same."""
    z_dim: int
    mapping_layers: int
    lr: float
    r1: float
    """R1 weight gamma at the last stage; scaled with the number of pixels at earlier ones."""
    r1_every: int
    mixing: float
    ema_images: float
    seed: int
    autoencode: float = 0.0
    """Weight of the reconstruction of real images through an encoder; 0: the paper's training."""
    kl: float = 5e-4
    """Weight per nat of KL(q(z|image) || N(0, 1)) in the autoencoding term."""
    autoencode_first: int = 0
    """For so many images only generator and encoder learn, as a variational autoencoder; steps are much faster then."""
    start_from: str | None = None
    """A generator file to fine-tune."""
    discriminator_first: int = 0
    """For so many images only the discriminator learns, since the file of `start_from` does not contain one."""
    rare: float = 0.05
    """Share of rendered faces with glasses, and with hats. A short training does not learn what 5 % of images show."""
    varied: bool = False
    """Whether rendered faces are the varied ones."""
    projected: float = 0.0
    """Weight of the heads on ImageNet features in the generator's loss, beside the discriminator's; 0: no heads."""
    hinge_bound: float = 0.6
    """A head with a lower hinge loss is not updated, so that no head becomes too good; at chance the loss is 2."""
    halvings: int = 0
    """How often images are halved for the discriminator; the heads see them at full size."""


def build(settings: Settings, resolution: int) -> dict[str, Any]:
    """New networks of one stage by name: generator, ema, discriminator, and encoder and heads if the settings ask."""
    num_blocks = resolution.bit_length() - 2
    channels = settings.channels[:num_blocks]
    size = {"channels": channels, "z_dim": settings.z_dim, "w_dim": settings.z_dim}
    networks = {
        "generator": StyleGAN2(**size, mapping_layers=settings.mapping_layers),  # type: ignore[arg-type]
        "ema": StyleGAN2(**size, mapping_layers=settings.mapping_layers),  # type: ignore[arg-type]
        "discriminator": Discriminator(channels=channels[settings.halvings :]),
    }
    if settings.autoencode:
        networks["encoder"] = Encoder(channels=channels, z_dim=settings.z_dim)
    if settings.projected and resolution >= ProjectedHeads.MIN_SIZE:
        networks["heads"] = ProjectedHeads(size=resolution)
    networks["ema"].load_state_dict(networks["generator"].state_dict())
    return networks


def optimizers(networks: dict[str, Any], settings: Settings) -> dict[str, torch.optim.Adam]:
    """One Adam per trained network, by name.

    The discriminator's is rescaled for lazy regularization (StyleGAN2, appendix B). Adversarial training is more stable
    without momentum. With an autoencoding term the generator has momentum all the same: without it the reconstruction
    hardly improved.
    """
    lazy = settings.r1_every / (settings.r1_every + 1)
    momentum = 0.5 if settings.autoencode else 0.0
    adams = {
        "generator": torch.optim.Adam(networks["generator"].parameters(), lr=settings.lr, betas=(momentum, 0.99)),
        "discriminator": torch.optim.Adam(
            networks["discriminator"].parameters(), lr=settings.lr * lazy, betas=(0.0, 0.99**lazy)
        ),
    }
    if "heads" in networks:
        trained = [p for p in networks["heads"].parameters() if p.requires_grad]
        adams["heads"] = torch.optim.Adam(trained, lr=settings.lr, betas=(0.0, 0.99))
    if "encoder" in networks:
        adams["encoder"] = torch.optim.Adam(networks["encoder"].parameters(), lr=settings.lr, betas=(0.9, 0.99))
    return adams


@torch.no_grad()
def grow(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Make the networks `new`, of twice the resolution, compute the images and logits of `old`."""
    for name in ("generator", "ema"):
        new[name].load_state_dict(old[name].state_dict(), strict=False)
        for block in new[name].blocks[len(old[name].blocks) :]:
            block.to_rgb.conv.weight.zero_()
    for name in new.keys() & {"discriminator", "encoder"}:
        grow_discriminator(old[name], new[name])
