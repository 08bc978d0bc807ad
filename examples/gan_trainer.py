"""One step of StyleGAN2's training, and everything it has to remember: networks, optimizers, position.

Non-saturating logistic loss, lazy R1, style mixing, EMA (StyleGAN2, Karras et al., CVPR 2020), and on request an
autoencoding term (VAE/GAN, Larsen et al., ICML 2016). A step's random numbers are a function of (seed, step, rank), so
that a resumed run continues bit by bit. In a torch.distributed group every process trains on its share of a batch, and
gradients are averaged. Knows networks and losses; does not know files, progress or where images come from.
"""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from discriminator import Discriminator, Encoder
from discriminator import grow as grow_discriminator
from torch import Tensor

from handsoff_stream.generators import Generator, StyleGAN2, load_generator


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is; recorded in its state. A resumed run goes on with the settings it is resumed with."""

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
    """Weight of a nat of KL(q(z|image) || N(0, 1)) beside it."""
    autoencode_first: int = 0
    """Until so many images, generator and encoder learn alone, as a variational autoencoder: several times as fast."""
    start_from: str | None = None
    """A generator file to fine-tune; its discriminator is not in it, so ..."""
    discriminator_first: int = 0
    """... for so many images only the new discriminator learns."""
    rare: float = 0.05
    """Of rendered faces, the share with glasses and the share with hats; in a short training, 5 % are passed over."""


def build(settings: Settings, resolution: int) -> dict[str, Any]:
    """Fresh networks and optimizers of one stage."""
    num_blocks = resolution.bit_length() - 2
    channels = settings.channels[:num_blocks]
    size = {"channels": channels, "z_dim": settings.z_dim, "w_dim": settings.z_dim}
    networks = {
        "generator": StyleGAN2(**size, mapping_layers=settings.mapping_layers),  # type: ignore[arg-type]
        "ema": StyleGAN2(**size, mapping_layers=settings.mapping_layers),  # type: ignore[arg-type]
        "discriminator": Discriminator(channels=channels),
    }
    if settings.autoencode:
        networks["encoder"] = Encoder(channels=channels, z_dim=settings.z_dim)
    networks["ema"].load_state_dict(networks["generator"].state_dict())
    return networks


def optimizers(networks: dict[str, Any], settings: Settings) -> dict[str, torch.optim.Adam]:
    """Adam for each; the discriminator's is rescaled for lazy regularisation (SG2, appendix B).

    Momentum is bad for opponents, and needed to learn codes: without it the reconstruction hardly improved.
    """
    lazy = settings.r1_every / (settings.r1_every + 1)
    momentum = 0.5 if settings.autoencode else 0.0
    adams = {
        "generator": torch.optim.Adam(networks["generator"].parameters(), lr=settings.lr, betas=(momentum, 0.99)),
        "discriminator": torch.optim.Adam(
            networks["discriminator"].parameters(), lr=settings.lr * lazy, betas=(0.0, 0.99**lazy)
        ),
    }
    if "encoder" in networks:
        adams["encoder"] = torch.optim.Adam(networks["encoder"].parameters(), lr=settings.lr, betas=(0.9, 0.99))
    return adams


@torch.no_grad()
def grow(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Networks of twice the resolution that compute what the old ones do: image and verdict do not jump."""
    for name in ("generator", "ema"):
        new[name].load_state_dict(old[name].state_dict(), strict=False)
        for block in new[name].blocks[len(old[name].blocks) :]:
            block.to_rgb.conv.weight.zero_()
    for name in new.keys() & {"discriminator", "encoder"}:
        grow_discriminator(old[name], new[name])


def pyramid_distance(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean squared difference, averaged over the images and three halvings of them (fewer for tiny ones).

    Squared, not absolute: the median of all faces has no eyes, and a generator that has found it is told nothing about
    where they might be; the mean has shadows of them, which pay as soon as they move the right way.
    """
    difference = (a_BCHW - b_BCHW).float()
    distances = [difference.square().mean()]
    while len(distances) < 4 and min(difference.shape[2:]) >= 4:
        difference = F.avg_pool2d(difference, 2)
        distances.append(difference.square().mean())
    return torch.stack(distances).mean()


def feature_distance(maps_a: list[Tensor], maps_b: list[Tensor]) -> Tensor:
    """Mean squared difference of feature maps relative to that of `maps_b` from zero, averaged over levels."""
    levels = [(a - b).float().square().mean() / b.float().square().mean() for a, b in zip(maps_a, maps_b, strict=True)]
    return torch.stack(levels).mean()


def average(tensors: list[Tensor]) -> None:
    """In place, the mean of each tensor over the processes of the group; nothing without a group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


def update(optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` on the gradients averaged over the group."""
    average([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
    optimizer.step()


class Trainer:
    """Networks, optimizers and position; `step` trains on one batch (in a group: on this process's share of it)."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype):
        self.settings, self.device, self.dtype = settings, device, dtype
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.num_images = 0
        self.num_steps = 0
        self.seconds = 0.0
        self.resolution = 0
        self.networks: dict[str, Any] = {}
        self.enter_stage(settings.stages[0][0])
        if settings.start_from is not None:
            self.fine_tune(load_generator(settings.start_from))

    def fine_tune(self, pretrained: Generator) -> None:
        """Begin from the weights of a trained generator of this geometry."""
        for name in ("generator", "ema"):
            self.networks[name].load_state_dict(pretrained.state_dict())

    def enter_stage(self, resolution: int) -> None:
        """Networks for this resolution; what an earlier stage learned is kept."""
        torch.manual_seed(self.settings.seed + resolution)  # initial weights only
        networks = build(self.settings, resolution)
        if self.resolution:
            grow(self.networks, networks)
        self.resolution = resolution
        self.networks = {name: network.to(self.device) for name, network in networks.items()}
        for name in self.networks.keys() - {"ema"}:
            self.networks[name].to(memory_format=torch.channels_last)
        self.networks["ema"].eval().requires_grad_(False)
        self.optimizers = optimizers(self.networks, self.settings)

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": json.dumps(asdict(self.settings)),
            "position": [self.num_images, self.num_steps, self.resolution],
            "seconds": self.seconds,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resolution = 0
        self.enter_stage(state["position"][2])
        self.num_images, self.num_steps, _ = state["position"]
        self.seconds = state["seconds"]
        for name in self.networks.keys() & state["networks"].keys():
            self.networks[name].load_state_dict(state["networks"][name])
        for name in self.optimizers.keys() & state["optimizers"].keys():
            optimizer = self.optimizers[name]
            chosen = {key: optimizer.param_groups[0][key] for key in ("lr", "betas")}
            optimizer.load_state_dict(state["optimizers"][name])
            optimizer.param_groups[0].update(chosen)

    def step(self, reals_BCHW: Tensor) -> dict[str, Tensor]:
        """One discriminator and one generator update on uint8 images [B, 3, H, W]; scalars to log, on the device."""
        started = time.monotonic()
        seed = (self.settings.seed * 1_000_003 + self.num_steps) * self.world + self.rank
        rng = torch.Generator().manual_seed(seed)
        reals = reals_BCHW.to(self.device).float() / 127.5 - 1
        flip = torch.rand(len(reals), generator=rng).lt(0.5).to(self.device)
        reals = torch.where(flip[:, None, None, None], reals.flip(3), reals)
        if self.num_images < self.settings.autoencode_first:
            metrics = self._autoencoder_step(reals, rng)
            self._update_ema()
        else:
            metrics = self._discriminator_step(reals, rng)
            if self.num_images >= self.settings.discriminator_first:
                metrics |= self._generator_step(reals, rng)
                self._update_ema()
        self.num_images += len(reals) * self.world
        self.num_steps += 1
        self.seconds += time.monotonic() - started
        return metrics

    def _generate(self, batch: int, rng: torch.Generator, z_encoded: Tensor | None = None) -> Tensor:
        """Images of `z_encoded` [E, z_dim] if given, then of random latents, `batch` in all."""
        generator = self.networks["generator"]
        z, z_other = torch.randn(2, batch, self.settings.z_dim, generator=rng).to(self.device)
        num_encoded = 0 if z_encoded is None else len(z_encoded)
        if z_encoded is not None:
            z = torch.cat([z_encoded, z[num_encoded:]])
        w, other = generator.mapping(torch.cat([z, z_other])).chunk(2)
        mean = other.detach().mean(dim=0)
        average([mean])
        generator.w_avg.lerp_(mean, 0.005)
        # Style mixing (SG1, section 3.1): a second latent takes over from a random layer on.
        first = torch.randint(1, generator.num_ws, (batch, 1), generator=rng)
        first[torch.rand(batch, generator=rng) >= self.settings.mixing] = generator.num_ws
        first[:num_encoded] = generator.num_ws
        takes_over = (torch.arange(generator.num_ws) >= first).to(self.device)[:, :, None]
        w_plus = torch.where(takes_over, other[:, None], w[:, None])
        noise = [torch.randn(batch, 1, *size, generator=rng).to(self.device) for size in generator.noise_shapes]
        return generator.synthesis(w_plus, noise, dtype=self.dtype).images

    def _autoencoder_step(self, reals: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        trained = [self.optimizers[name] for name in ("generator", "encoder")]
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        self.networks["discriminator"].requires_grad_(False)
        z, kl = self._encode(reals, rng)
        fakes = self._generate(len(reals), rng, z)
        loss, metrics = self._reconstruction(
            fakes, self.networks["discriminator"].features(fakes, self.dtype), reals, kl
        )
        loss.backward()
        self.networks["discriminator"].requires_grad_(True)
        for optimizer in trained:
            update(optimizer)
        return metrics

    def _reconstruction(
        self, fakes: Tensor, maps: list[Tensor], reals: Tensor, kl: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoding loss of images made from the codes of `reals`; `maps`: their features.

        VAE/GAN (Larsen et al., ICML 2016): real images must come out of their own codes, judged by pixels and by the
        discriminator's features, so that no mode of the data is left out.
        """
        with torch.no_grad():
            maps_real = self.networks["discriminator"].features(reals, self.dtype)
        pixels, features = pyramid_distance(fakes, reals), feature_distance(maps, maps_real)
        loss = self.settings.autoencode * (pixels + 0.1 * features) + self.settings.kl * kl
        return loss, {"pixels": pixels.detach(), "features": features.detach(), "kl": kl.detach()}

    def _encode(self, reals: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, z_dim] drawn from q(z | image), and KL(q(z | image) || N(0, 1)) in nats, averaged over images."""
        mean, log_variance = self.networks["encoder"](reals, self.dtype)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=rng).to(self.device)
        return z, (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2

    def _encoded_share(self, reals: Tensor) -> Tensor:
        """The images of a batch whose codes stand in for random latents: half of them, or none without encoder."""
        return reals[: len(reals) // 2 if "encoder" in self.networks else 0]

    def _discriminator_step(self, reals: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        discriminator, optimizer = self.networks["discriminator"], self.optimizers["discriminator"]
        encoded = self._encoded_share(reals)
        with torch.no_grad():
            fakes = self._generate(len(reals), rng, self._encode(encoded, rng)[0] if len(encoded) else None)
        optimizer.zero_grad(set_to_none=True)
        logits_real = discriminator(reals, self.dtype)
        logits_fake = discriminator(fakes, self.dtype)
        loss = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        loss.backward()
        metrics = {"loss_d": loss.detach(), "sign_real": logits_real.detach().sign().mean()}
        if self.num_steps % self.settings.r1_every == 0:
            reals = reals.detach().requires_grad_()
            (grad,) = torch.autograd.grad(discriminator(reals).sum(), reals, create_graph=True)
            penalty = grad.square().sum(dim=(1, 2, 3)).mean()
            gamma = self.settings.r1 * (self.resolution / self.settings.stages[-1][0]) ** 2
            (penalty * (gamma / 2 * self.settings.r1_every)).backward()
            metrics["r1"] = penalty.detach()
        update(optimizer)
        return metrics

    def _generator_step(self, reals: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        discriminator = self.networks["discriminator"]
        trained = [self.optimizers[name] for name in ("generator", "encoder") if name in self.optimizers]
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        discriminator.requires_grad_(False)
        encoded = self._encoded_share(reals)
        z_encoded, kl = self._encode(encoded, rng) if len(encoded) else (None, None)
        fakes = self._generate(len(reals), rng, z_encoded)
        maps = discriminator.features(fakes, self.dtype)
        loss = F.softplus(-discriminator.judge(maps[-1])).mean()
        metrics = {"loss_g": loss.detach()}
        if kl is not None:
            shared = [m[: len(encoded)] for m in maps]
            reconstruction, more = self._reconstruction(fakes[: len(encoded)], shared, encoded, kl)
            loss, metrics = loss + reconstruction, metrics | more
        loss.backward()
        discriminator.requires_grad_(True)
        for optimizer in trained:
            update(optimizer)
        return metrics

    @torch.no_grad()
    def _update_ema(self) -> None:
        half_life = min(self.settings.ema_images, max(self.num_images * 0.05, 1.0))
        beta = 0.5 ** (self.settings.batch / half_life)
        ema, generator = self.networks["ema"], self.networks["generator"]
        torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), 1 - beta)
        for mine, theirs in zip(ema.buffers(), generator.buffers(), strict=True):
            mine.copy_(theirs)
