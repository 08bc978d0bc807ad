"""Real image => the latent that the generator makes it from, by gradient descent in W+ (HandsOff, section 3.1).

    min over w, |w - w_e|^2 <= radius, of P(x, G(w)) + pixel_weight * MSE(x, G(w))

P is a perceptual distance; in the paper it is LPIPS.

Every image has its own optimizer state, learning curve and best iterate, and its gradient does not depend on the images
that share its batch. The generator's weights and noise maps stay as they are, so that it can go on making new images.

Knows generators and a perceptual distance. Does not know labels, or where images come from; `store` keeps results on
disk.

Shape letters: B batch, N images, S candidates, L number of style inputs, D latent size, H W image size.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.generators import Generator

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

PUBLISHED_STEPS = {"cars": 300, "faces": 500, "full-bodies": 2000, "streets": 500}
"""Domain => gradient steps (HandsOff, appendix A.2)."""


@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """How to descend. The defaults are the published code's, where it has them.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 500
    """See `PUBLISHED_STEPS`; there are no other differences between the published domains."""
    learning_rate: float = 0.1
    """Peak of the schedule, see `learning_rate_at`."""
    pixel_weight: float = 0.1
    """lambda of HandsOff, section 3.1; of the mean squared error, as in the published code."""
    radius: float | None = 0.5
    """c_reg of HandsOff, section 3.1: bound on |w - w_e|^2 over all of a w+, if there is an encoding w_e. So small a
    ball is crossed in a few steps at any learning rate: peaks of 0.003 to 0.1 end within 0.1 % of each other's loss.
    None: the descent starts at w_e and may go anywhere."""
    candidates: int = 256
    """Without an encoding: descend from the best of this many random latents; 0 for the average latent."""
    candidate_truncation: float = 0.7
    seed: int = 0
    """Of the candidates."""

    def __post_init__(self) -> None:
        for name in ("steps", "candidates"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not a count; pass 0 or more")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} makes no step; pass a positive number")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"radius={self.radius} is not a bound; pass a positive number, or None for no bound")
        if self.pixel_weight < 0:
            raise ValueError(f"pixel_weight={self.pixel_weight} rewards difference; pass 0 or more")

    @classmethod
    def for_domain(cls, domain: str) -> "InversionSettings":
        """The settings of the paper for a domain.

        Raises:
            ValueError: a domain that `PUBLISHED_STEPS` does not have.
        """
        if domain not in PUBLISHED_STEPS:
            raise ValueError(f"no steps were published for {domain!r}; pass one of {sorted(PUBLISHED_STEPS)}, or steps")
        return cls(steps=PUBLISHED_STEPS[domain])

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Inversion:
    """Latents of N images, each the best iterate of its descent, and how near they come to their images; on the CPU."""

    w_plus: Tensor
    """float32 [N, L, D]."""
    loss: Tensor
    """float32 [N], perceptual + pixel_weight * mse."""
    perceptual: Tensor
    """float32 [N], the perceptual distance."""
    mse: Tensor
    """float32 [N], mean squared error of pixels in [-1, 1]."""

    @property
    def psnr(self) -> Tensor:
        """Peak signal-to-noise ratio, float32 [N], in dB; the range of pixels is 2."""
        return 10 * torch.log10(4 / self.mse)

    def __len__(self) -> int:
        return len(self.w_plus)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear rise over the first 5 % of the steps, cosine fall over the last 25 % (StyleGAN2, appendix D)."""
    done = step / steps
    fall = min(1.0, (1.0 - done) / 0.25)
    return peak * (0.5 - 0.5 * math.cos(fall * math.pi)) * min(1.0, done / 0.05)


def project_to_ball(w_plus_BLD: Tensor, center_BLD: Tensor, radius: float) -> Tensor:
    """The nearest w+ with |w+ - center|^2 <= radius, of each image by itself; float32 [B, L, D] like both arguments."""
    offset_BLD = w_plus_BLD - center_BLD
    length_B11 = offset_BLD.flatten(1).norm(dim=1)[:, None, None]
    # Slightly inside, so that the bound holds after rounding too.
    scale_B11 = (math.sqrt(radius) * (1 - 1e-6) / length_B11.clamp(min=1e-12)).clamp(max=1.0)
    return center_BLD + offset_BLD * scale_B11


def invert_batch(
    generator: Generator,
    images_BCHW: Tensor,
    perceptual: Perceptual,
    settings: InversionSettings | None = None,
    *,
    encoding: Tensor | None = None,
    progress: Progress | None = None,
) -> Inversion:
    """Latents of a batch of images, all at once.

    Args:
        generator: its weights are left alone; computes where they are.
        images_BCHW: float32 [B, 3, H, W] in [0, 1], of the generator's resolution.
        perceptual: the image distance; moved to the generator's device.
        settings: how to descend.
        encoding: w_e, float32 [B, L, D], predicted by an encoder, to start from and to stay near (|w - w_e|^2 <=
            `settings.radius`). Without one, the descent starts at the best of random candidates and is not bounded.
        progress: called at every step.

    Raises:
        ValueError: images or encoding of the wrong shape or range.
        FloatingPointError: an image's loss is not finite from the start.
    """
    settings = settings or InversionSettings()
    _check(generator, images_BCHW, encoding)
    device = generator.w_avg.device
    objective = _Objective(generator, perceptual.to(device), images_BCHW.to(device), settings.pixel_weight)
    start_BLD = objective.best_candidate(settings) if encoding is None else encoding.to(device, torch.float32)
    radius = None if encoding is None else settings.radius
    best = _descend(objective, start_BLD, radius, settings, progress)
    if not torch.isfinite(best.loss).all():
        raise FloatingPointError(
            f"the losses {best.loss.tolist()} are not all finite; check the generator's weights and the images for NaN"
        )
    return Inversion(*(field.cpu() for field in (best.w_plus, best.loss, best.perceptual, best.mse)))


def _check(generator: Generator, images_BCHW: Tensor, encoding: Tensor | None) -> None:
    expected = (3, *generator.resolution)
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected or len(images_BCHW) == 0:
        raise ValueError(
            f"images are {list(images_BCHW.shape)}, this generator makes [B, {', '.join(map(str, expected))}]; "
            "resize them before inversion"
        )
    if not images_BCHW.is_floating_point() or images_BCHW.min() < 0 or images_BCHW.max() > 1:
        raise ValueError("images must be floating point in [0, 1]; divide 8-bit images by 255")
    shape = (len(images_BCHW), generator.num_ws, generator.w_dim)
    if encoding is not None and tuple(encoding.shape) != shape:
        raise ValueError(f"encoding is {list(encoding.shape)}, these images need {list(shape)}: one w+ each")


class _Objective:
    """The loss of latents against fixed images."""

    def __init__(self, generator: Generator, perceptual: Perceptual, images_BCHW: Tensor, pixel_weight: float) -> None:
        self.generator, self.perceptual, self.pixel_weight = generator, perceptual, pixel_weight
        self.images_BCHW = images_BCHW.float() * 2 - 1
        with torch.no_grad():
            self.embedding_BN = perceptual.embed(self.images_BCHW)

    def __call__(self, w_plus_BLD: Tensor) -> Inversion:
        images_BCHW = self.generator.synthesis(w_plus_BLD, "const").images
        perceptual_B = (self.perceptual.embed(images_BCHW) - self.embedding_BN).square().sum(dim=1)
        mse_B = (images_BCHW - self.images_BCHW).square().mean(dim=(1, 2, 3))
        return Inversion(w_plus_BLD, perceptual_B + self.pixel_weight * mse_B, perceptual_B, mse_B)

    @torch.no_grad()
    def best_candidate(self, settings: InversionSettings) -> Tensor:
        """Of the average and random latents the one of least loss, [B, L, D]; all images choose from the same ones."""
        w_avg = self.generator.w_avg
        random = torch.Generator().manual_seed(settings.seed)
        z_SD = torch.randn(settings.candidates, self.generator.z_dim, generator=random).to(w_avg.device)
        w_SD = torch.cat([w_avg[None], self.generator.mapping(z_SD)]) if len(z_SD) else w_avg[None]
        w_plus_SLD = self.generator.truncate(w_SD, settings.candidate_truncation)
        losses = [self._pairwise(chunk_SLD) for chunk_SLD in w_plus_SLD.split(16)]
        return w_plus_SLD[torch.cat(losses).argmin(dim=0)]

    def _pairwise(self, w_plus_SLD: Tensor) -> Tensor:
        """[S, B]: the loss of every latent against every image."""
        images = self.generator.synthesis(w_plus_SLD, "const").images
        perceptual_SB = torch.cdist(self.perceptual.embed(images), self.embedding_BN).square()
        mse_SB = torch.cdist(images.flatten(1), self.images_BCHW.flatten(1)).square() / images[0].numel()
        return perceptual_SB + self.pixel_weight * mse_SB


def _descend(
    objective: _Objective,
    start_BLD: Tensor,
    radius: float | None,
    settings: InversionSettings,
    progress: Progress | None,
) -> Inversion:
    """Best iterate of each image, the start and the last included, none farther from the start than allowed."""
    w_plus_BLD = start_BLD.clone().requires_grad_()
    optimizer = torch.optim.Adam([w_plus_BLD], lr=settings.learning_rate)
    best: Inversion | None = None
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, settings.steps, settings.learning_rate)
        now = objective(w_plus_BLD)
        best = _better(best, now)
        (w_plus_BLD.grad,) = torch.autograd.grad(now.loss.sum(), w_plus_BLD)
        optimizer.step()
        if radius is not None:
            with torch.no_grad():
                w_plus_BLD.copy_(project_to_ball(w_plus_BLD, start_BLD, radius))
        if progress is not None:
            progress(step + 1, settings.steps)
    with torch.no_grad():
        return _better(best, objective(w_plus_BLD))


def _better(best: Inversion | None, now: Inversion) -> Inversion:
    """Of each image the iterate of lower loss; copied, because the optimizer goes on writing to the current one."""
    now = Inversion(*(t.detach().clone() for t in (now.w_plus, now.loss, now.perceptual, now.mse)))
    if best is None:
        return now
    lower_B = now.loss < best.loss
    return replace(
        now,
        w_plus=torch.where(lower_B[:, None, None], now.w_plus, best.w_plus),
        loss=torch.where(lower_B, now.loss, best.loss),
        perceptual=torch.where(lower_B, now.perceptual, best.perceptual),
        mse=torch.where(lower_B, now.mse, best.mse),
    )
