"""One step of StyleGAN2's training, and the state of a run: networks, optimizers, position.

Non-saturating logistic loss, lazy R1, style mixing, EMA (StyleGAN2, Karras et al., CVPR 2020). Two terms are optional:
heads on frozen ImageNet features (Projected GAN, Sauer et al., NeurIPS 2021) in addition to the discriminator (as in
Vision-aided GAN, Kumari et al., CVPR 2022), and an autoencoding term (VAE/GAN, Larsen et al., ICML 2016). Each step
makes one batch of fakes and computes all losses on it. Its random numbers are a function of (seed, rollbacks, step,
rank), so a resumed run gives the same bits. In a torch.distributed group every process trains on its share of a batch,
and gradients are averaged. Knows networks and losses. Does not know files, progress or where images come from.
"""

import json
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.generators import Generator, load_generator
from handsoff_stream.imagenet import FrozenFeatures
from recipes.faces.fused_synthesis import fuse
from recipes.faces.gan_losses import average, feature_distance, pyramid_distance, update
from recipes.faces.gan_networks import Settings, build, grow, optimizers
from recipes.faces.projected import STRIDES, augment


class Trainer:
    """Networks, optimizers and position; `step` trains on one batch, or in a group on this process's share of it.

    Args:
        settings: of the run.
        device: where networks and images are.
        dtype: of the convolutions.
        compiled: whether the synthesis's element-wise passes are compiled (see `fused_synthesis`).
    """

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype, *, compiled: bool = False):
        self.settings, self.device, self.dtype, self.compiled = settings, device, dtype, compiled
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.num_images = 0
        self.num_steps = 0
        self.num_rollbacks = 0
        self.seconds = 0.0
        self.resolution = 0
        self.networks: dict[str, Any] = {}
        self.features = FrozenFeatures(STRIDES).to(device, dtype) if settings.projected else None
        self.enter_stage(settings.stages[0][0])
        if settings.start_from is not None:
            self.fine_tune(load_generator(settings.start_from))

    def fine_tune(self, pretrained: Generator) -> None:
        """Start from the weights of a trained generator of the same geometry."""
        for name in ("generator", "ema"):
            self.networks[name].load_state_dict(pretrained.state_dict())

    def enter_stage(self, resolution: int) -> None:
        """Make the networks of this resolution; they keep what the earlier stage learned."""
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
        """Everything that a resumed run needs, for `torch.save`; readable with `weights_only=True`."""
        return {
            "settings": json.dumps(asdict(self.settings)),
            "position": [self.num_images, self.num_steps, self.resolution],
            "rollbacks": self.num_rollbacks,
            "seconds": self.seconds,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; learning rate and momentum stay those of the settings."""
        self.resolution = 0
        self.enter_stage(state["position"][2])
        self.num_images, self.num_steps, _ = state["position"]
        self.num_rollbacks = state.get("rollbacks", 0)
        self.seconds = state["seconds"]
        for name in self.networks.keys() & state["networks"].keys():
            self.networks[name].load_state_dict(state["networks"][name])
        for name in self.optimizers.keys() & state["optimizers"].keys():
            optimizer = self.optimizers[name]
            chosen = {key: optimizer.param_groups[0][key] for key in ("lr", "betas")}
            optimizer.load_state_dict(state["optimizers"][name])
            optimizer.param_groups[0].update(chosen)

    def roll_back(self, good: dict[str, Any]) -> None:
        """Return to the state `good`; other random numbers are drawn from there on, and the heads' weight is halved."""
        rollbacks = self.num_rollbacks + 1
        self.load_state_dict(good)
        self.num_rollbacks = rollbacks

    def step(self, reals_BCHW: Tensor) -> dict[str, Tensor]:
        """One update of every network on uint8 images [B, 3, H, W]; scalars to log, on the device."""
        started = time.monotonic()
        seed = (self.settings.seed * 1_000_003 + self.num_steps) * self.world + self.rank
        rng = torch.Generator().manual_seed(seed + self.num_rollbacks * 2**40)
        reals = reals_BCHW.to(self.device).float() / 127.5 - 1
        flip = torch.rand(len(reals), generator=rng).lt(0.5).to(self.device)
        reals = torch.where(flip[:, None, None, None], reals.flip(3), reals)
        if self.num_images < self.settings.autoencode_first:
            metrics = self._autoencoder_step(reals, rng)
            self._update_ema()
        else:
            metrics = self._adversarial_step(reals, rng)
        self.num_images += len(reals) * self.world
        self.num_steps += 1
        self.seconds += time.monotonic() - started
        return metrics

    def _adversarial_step(self, reals: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        generator_learns = self.num_images >= self.settings.discriminator_first
        encoded = self._encoded_share(reals)
        with torch.set_grad_enabled(generator_learns):
            z_encoded, kl = self._encode(encoded, rng) if len(encoded) else (None, None)
            fakes = self._generate(len(reals), rng, z_encoded)
            maps_fake = self._project(fakes, rng)
        metrics = self._discriminator_step(reals, fakes.detach())
        if "heads" in self.networks:
            with torch.no_grad():
                maps_real = self._project(reals, rng)
            metrics |= self._heads_step(maps_real, [m.detach() for m in maps_fake])
        if generator_learns:
            metrics |= self._generator_step(fakes, maps_fake, encoded, kl)
            self._update_ema()
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
        # Style mixing (StyleGAN, section 3.1): a second latent replaces the first from a random layer on.
        first = torch.randint(1, generator.num_ws, (batch, 1), generator=rng)
        first[torch.rand(batch, generator=rng) >= self.settings.mixing] = generator.num_ws
        first[:num_encoded] = generator.num_ws
        takes_over = (torch.arange(generator.num_ws) >= first).to(self.device)[:, :, None]
        w_plus = torch.where(takes_over, other[:, None], w[:, None])
        noise = [torch.randn(batch, 1, *size, generator=rng).to(self.device) for size in generator.noise_shapes]
        folded = generator.fold(self.dtype)
        images: Tensor = (fuse(folded) if self.compiled else folded)(w_plus, noise).images
        return images

    def _project(self, images: Tensor, rng: torch.Generator) -> list[Tensor]:
        """The mixed features of the augmented images, which the heads read; empty without heads."""
        if "heads" not in self.networks or self.features is None:
            return []
        maps: list[Tensor] = self.networks["heads"].mix(self.features(augment(images, rng)))
        return maps

    def _coarse(self, images: Tensor) -> Tensor:
        """The images at the discriminator's resolution."""
        return F.avg_pool2d(images, 2**self.settings.halvings) if self.settings.halvings else images

    def _autoencoder_step(self, reals: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        trained = [self.optimizers[name] for name in ("generator", "encoder")]
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        self.networks["discriminator"].requires_grad_(False)
        z, kl = self._encode(reals, rng)
        fakes = self._generate(len(reals), rng, z)
        maps = self.networks["discriminator"].features(self._coarse(fakes), self.dtype)
        loss, metrics = self._reconstruction(fakes, maps, reals, kl)
        loss.backward()
        self.networks["discriminator"].requires_grad_(True)
        for optimizer in trained:
            update(optimizer)
        return metrics

    def _reconstruction(
        self, fakes: Tensor, maps: list[Tensor], reals: Tensor, kl: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoding loss of `fakes`, made from the codes of `reals`; `maps`: discriminator features of `fakes`.

        VAE/GAN (Larsen et al., ICML 2016): every real image must be reconstructed from its code, as measured by pixels
        and by the discriminator's features, so no mode of the data is dropped.
        """
        with torch.no_grad():
            maps_real = self.networks["discriminator"].features(self._coarse(reals), self.dtype)
        pixels, features = pyramid_distance(fakes, reals), feature_distance(maps, maps_real)
        loss = self.settings.autoencode * (pixels + 0.1 * features) + self.settings.kl * kl
        return loss, {"pixels": pixels.detach(), "features": features.detach(), "kl": kl.detach()}

    def _encode(self, reals: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, z_dim] drawn from q(z | image), and KL(q(z | image) || N(0, 1)) in nats, averaged over images."""
        mean, log_variance = self.networks["encoder"](reals, self.dtype)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=rng).to(self.device)
        return z, (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2

    def _encoded_share(self, reals: Tensor) -> Tensor:
        """The images of a batch whose codes replace random latents: half of the batch, or none without an encoder."""
        return reals[: len(reals) // 2 if "encoder" in self.networks else 0]

    def _discriminator_step(self, reals: Tensor, fakes: Tensor) -> dict[str, Tensor]:
        discriminator, optimizer = self.networks["discriminator"], self.optimizers["discriminator"]
        reals, fakes = self._coarse(reals), self._coarse(fakes)
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
            gamma = self.settings.r1 * (reals.shape[-1] / self.settings.stages[-1][0]) ** 2
            (penalty * (gamma / 2 * self.settings.r1_every)).backward()
            metrics["r1"] = penalty.detach()
        update(optimizer)
        return metrics

    def _heads_step(self, maps_real: list[Tensor], maps_fake: list[Tensor]) -> dict[str, Tensor]:
        """Hinge loss; heads whose loss is below the bound are not updated."""
        heads, optimizer = self.networks["heads"], self.optimizers["heads"]
        optimizer.zero_grad(set_to_none=True)
        hinge = F.relu(1 - heads(maps_real)).mean(dim=1) + F.relu(1 + heads(maps_fake)).mean(dim=1)
        losses = hinge.detach().clone()
        average([losses])
        learning = losses >= self.settings.hinge_bound
        (hinge * learning).sum().backward()
        for head, learns in zip(heads.heads, learning.tolist(), strict=True):
            if not learns:  # with a zero gradient Adam would still move by its momentum
                for parameter in head.parameters():
                    parameter.grad = None
        update(optimizer)
        return {f"hinge_{stride}": loss for stride, loss in zip((4, 8, 16, 32), losses, strict=True)}

    def _generator_step(
        self, fakes: Tensor, maps_fake: list[Tensor], encoded: Tensor, kl: Tensor | None
    ) -> dict[str, Tensor]:
        discriminator = self.networks["discriminator"]
        trained = [self.optimizers[name] for name in ("generator", "encoder") if name in self.optimizers]
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        adversaries = [self.networks[name] for name in ("discriminator", "heads") if name in self.networks]
        for adversary in adversaries:
            adversary.requires_grad_(False)
        maps = discriminator.features(self._coarse(fakes), self.dtype)
        loss = F.softplus(-discriminator.logits(maps[-1])).mean()
        metrics = {"loss_g": loss.detach()}
        if maps_fake:
            heads_loss = -self.networks["heads"](maps_fake).mean()
            loss = loss + self.settings.projected * 0.5**self.num_rollbacks * heads_loss
            metrics["loss_heads"] = heads_loss.detach()
        if kl is not None:
            shared = [m[: len(encoded)] for m in maps]
            reconstruction, more = self._reconstruction(fakes[: len(encoded)], shared, encoded, kl)
            loss, metrics = loss + reconstruction, metrics | more
        loss.backward()
        for adversary in adversaries:
            adversary.requires_grad_(True)
        for optimizer in trained:
            update(optimizer)
        return metrics

    @torch.no_grad()
    def _update_ema(self) -> None:
        half_life = self.settings.ema_images
        if self.settings.start_from is None:  # what a fresh generator made at first is soon forgotten
            half_life = min(half_life, max(self.num_images * 0.05, 1.0))
        beta = 0.5 ** (self.settings.batch / half_life)
        ema, generator = self.networks["ema"], self.networks["generator"]
        torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), 1 - beta)
        for mine, theirs in zip(ema.buffers(), generator.buffers(), strict=True):
            mine.copy_(theirs)
