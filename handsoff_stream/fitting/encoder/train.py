"""Real images and a generator => an encoder, for a domain that has none.

ReStyle's training (Alaluf et al., ICCV 2021, section 3.2): an image goes through all passes, each pass's
reconstruction is compared with the image (L2 + LPIPS), and the weights are updated once for all passes. HandsOff
trains on the same images that it inverts afterwards (appendix A.2); the encoder is not used for others.

An EfficientNet-Lite0 starts from ImageNet weights and learns the latents of the generator's own samples, which are
known (`samples`); for the last `REAL_SHARE` of the steps it also sees real images through the generator, as above, with
pixels compared at `PIXEL_SCALES` scales. Its BatchNorm then uses the statistics of the samples, and gradients are
clipped, without which it diverged.

An interrupted run continues to the same bits: which images a step sees is a function of (seed, step), everything else
is in the state file. Knows losses and steps. Does not know networks (`backbones`) or folders.

Shape letters: B batch, H W image size.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.tensors import read_tensors, write_tensors
from handsoff_stream.fitting.encoder.backbones import EFFICIENTNET, PUBLISHED_UNITS, EncoderConfig, StyleEncoder
from handsoff_stream.fitting.encoder.files import FORMAT_VERSION, save_encoder
from handsoff_stream.fitting.encoder.restyle import NamedImages, iterate, resize_generated, to_working_size
from handsoff_stream.fitting.encoder.samples import known_samples, latent_deviation, latent_error
from handsoff_stream.fitting.inversion.descent import learning_rate_at
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.generators import Generator
from handsoff_stream.progress import progress_bar
from handsoff_stream.provenance import versions
from handsoff_stream.seeding import transform_seed

STATE_KEY = "handsoff_stream_encoder_training"
ENCODER, OPTIMIZER = "encoder.", "optimizer."
REAL_SHARE = 0.4
PIXEL_SCALES = 4
MAX_GRADIENT_NORM = 1.0
# Name => (backbone, widths, units, longest side of its images). "small" is for CPUs and some hundred images.
ENCODER_ARCHITECTURES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]] = {
    "small": ("resnet34", (32, 32, 64, 96, 128), (1, 1, 1, 1), 128),
    "resnet34": ("resnet34", (64, 64, 128, 256, 512), PUBLISHED_UNITS["resnet34"], 256),
    "ir_se50": ("ir_se50", (64, 64, 128, 256, 512), PUBLISHED_UNITS["ir_se50"], 256),
    EFFICIENTNET: (EFFICIENTNET, (), (), 256),
}
MIN_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How to train.

    Raises:
        ValueError: a setting out of its range.
    """

    architecture: str = "small"
    """One of `ENCODER_ARCHITECTURES`. "efficientnet-lite0" starts from ImageNet weights, and learns from samples first;
    "ir_se50" and "resnet34" are those of ReStyle, of some 200 million weights, for a GPU."""
    offsets: bool = True
    """Whether codes are offsets from the first (e4e) or independent (pSp)."""
    steps: int = 500
    batch_size: int = 8
    iterations: int | None = None
    """Passes per step; ReStyle has 5. None: 1 of "efficientnet-lite0", 3 of the others."""
    learning_rate: float = 1e-3
    """Peak of Adam's, see `learning_rate_at`; ReStyle has 1e-4 and half a million steps."""
    pixel_weight: float = 1.0
    """Of the mean squared error of pixels in [-1, 1]; as in ReStyle."""
    perceptual_weight: float = 0.8
    """Of the perceptual distance; as in ReStyle."""
    seed: int = 0
    """Of the first weights and of the order of the images."""

    def __post_init__(self) -> None:
        if self.architecture not in ENCODER_ARCHITECTURES:
            raise ValueError(
                f"architecture={self.architecture!r} is unknown; pass one of {sorted(ENCODER_ARCHITECTURES)}"
            )
        for name in ("steps", "batch_size", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} trains nothing; pass 1 or more")
        if self.on_samples and self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size} gives BatchNorm no statistics; pass 2 or more")
        if not self.learning_rate > 0 or min(self.pixel_weight, self.perceptual_weight) < 0:
            raise ValueError(
                f"learning_rate={self.learning_rate}, pixel_weight={self.pixel_weight}, perceptual_weight="
                f"{self.perceptual_weight}: pass a positive rate, and weights of at least 0"
            )

    @property
    def on_samples(self) -> bool:
        """Whether the encoder learns from the generator's samples, and from real images only at the end."""
        return self.architecture == EFFICIENTNET

    @property
    def passes(self) -> int:
        """Passes per step."""
        if self.iterations is not None:
            return self.iterations
        return 1 if self.on_samples else 3

    def sees_images(self, step: int) -> bool:
        """Whether a step, counted from 0, sees real images."""
        return not self.on_samples or step >= round((1 - REAL_SHARE) * self.steps)

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def train_encoder(
    generator: Generator,
    images: NamedImages,
    perceptual: Perceptual,
    out: str | Path,
    settings: EncoderSettings | None = None,
    *,
    save_every: int = 100,
    progress: bool = False,
) -> StyleEncoder:
    """Train an encoder, and write it to a file that `load_restyle` reads.

    Args:
        generator: its weights are left alone; computes where they are.
        images: real images of the generator's proportions; read again at every step.
        perceptual: the image distance; moved to the generator's device.
        out: `.safetensors` file to write. While training, the state is in `state_path(out)`: the same call continues
            from there.
        settings: how to train.
        save_every: steps between two states.
        progress: show a bar.

    Returns:
        The encoder, on the generator's device, in eval mode, without gradients.

    Raises:
        ValueError: no images, or images of another shape than the generator's.
        FileNotFoundError: there is no folder to write to.
        CheckpointError: a state file that is damaged, or of a training with other arguments.
        FloatingPointError: the loss has become infinite or NaN.
    """
    settings = settings or EncoderSettings()
    if len(images) == 0:
        raise ValueError("there are no images to train on; pass at least one")
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder, so the encoder could not be written; create it first")
    first = images[0]
    identity = _identity(generator, len(images), first, perceptual, settings)
    training = _Training(generator, perceptual.to(generator.w_avg.device), settings)
    to_working_size(training.encoder, generator, first[1][None])  # refuses a wrong shape before the first step
    start = training.load_state(state_path(out), identity) if state_path(out).is_file() else 0
    with progress_bar("Training the encoder", settings.steps, show=progress) as update:
        for step in range(start, settings.steps):
            loss = training.step(step, _batch(images, step, settings) if settings.sees_images(step) else None)
            update(step + 1, f"loss {loss:.4f}")
            if (step + 1) % save_every == 0:
                training.save_state(state_path(out), identity, step + 1)
    save_encoder(out, training.encoder, {**identity, "versions": versions()})
    state_path(out).unlink(missing_ok=True)
    return training.encoder.eval().requires_grad_(False)


def state_path(out: str | Path) -> Path:
    """Where `train_encoder(out=...)` keeps its state."""
    return Path(out).with_suffix(".training.safetensors")


def encoder_config(generator: Generator, settings: EncoderSettings) -> EncoderConfig:
    """Geometry of an encoder for a generator: its latents, its proportions."""
    backbone, widths, units, longest = ENCODER_ARCHITECTURES[settings.architecture]
    scale = max(min(1.0, longest / max(generator.resolution)), MIN_SIDE / min(generator.resolution))
    height, width = (round(side * scale) for side in generator.resolution)
    return EncoderConfig(
        backbone=backbone,
        widths=widths,
        units=units,
        num_ws=generator.num_ws,
        w_dim=generator.w_dim,
        image_size=(height, width),
        input_channels=3 if settings.on_samples and settings.passes == 1 else 6,
        offsets=settings.offsets,
        iterations=settings.passes,
    )


class _Training:
    """Encoder and optimizer: everything that changes from step to step."""

    def __init__(self, generator: Generator, perceptual: Perceptual, settings: EncoderSettings) -> None:
        self.generator, self.perceptual, self.settings = generator, perceptual, settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            encoder = StyleEncoder(encoder_config(generator, settings))
        encoder.latent_avg.copy_(generator.w_avg.expand_as(encoder.latent_avg))
        if settings.on_samples:
            encoder.load_imagenet()
            encoder.latent_std.copy_(latent_deviation(generator, settings.seed))
        self.encoder = encoder.to(generator.w_avg.device)
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), lr=settings.learning_rate)

    def step(self, step: int, images_BCHW: Tensor | None) -> float:
        """One update; returns its loss, the mean over passes. `images_BCHW`: None for samples only."""
        settings = self.settings
        self.optimizer.zero_grad()
        value = 0.0
        if settings.on_samples:
            w_BD, made_BCHW = known_samples(self.generator, settings.seed, step, settings.batch_size)
            error = latent_error(self.encoder, self.generator, w_BD, made_BCHW)
            error.backward()
            value += error.item()
        if images_BCHW is not None:
            value += self._reconstruct(images_BCHW.to(self.generator.w_avg.device))
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of step {step} is {value}; lower learning_rate={settings.learning_rate}"
            )
        if settings.on_samples:
            nn.utils.clip_grad_norm_(self.encoder.parameters(), MAX_GRADIENT_NORM)
        rate = learning_rate_at(step + 1, settings.steps + 1, settings.learning_rate)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return value

    def _reconstruct(self, images_BCHW: Tensor) -> float:
        """Gradients of how far the images' reconstructions are from them; the loss, the mean over passes."""
        settings = self.settings
        target_BCHW = to_working_size(self.encoder, self.generator, images_BCHW)
        with torch.no_grad():
            embedding_BN = self.perceptual.embed(target_BCHW)
        total = torch.zeros((), device=images_BCHW.device)
        self.encoder.train(not settings.on_samples)
        for _, made_BCHW in iterate(self.encoder, self.generator, images_BCHW):
            seen_BCHW = resize_generated(self.encoder, made_BCHW)
            perceptual = (self.perceptual.embed(seen_BCHW) - embedding_BN).square().sum(dim=1).mean()
            pixel = _pixel_error(seen_BCHW - target_BCHW, PIXEL_SCALES if settings.on_samples else 1)
            loss = settings.pixel_weight * pixel + settings.perceptual_weight * perceptual
            loss.backward()
            total += loss.detach() / settings.passes
        self.encoder.train()
        return total.item()

    def save_state(self, path: Path, identity: dict[str, Any], steps_done: int) -> None:
        """Write weights and optimizer state, whole or not at all."""
        tensors = {f"{ENCODER}{name}": t for name, t in self.encoder.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{number}.{name}": t for name, t in moments.items()}
        manifest = {"format_version": FORMAT_VERSION, "identity": identity, "steps_done": steps_done}
        write_tensors(path, tensors, key=STATE_KEY, manifest=manifest)

    def load_state(self, path: Path, identity: dict[str, Any]) -> int:
        """Continue from a state; returns the number of steps done."""
        manifest, tensors = read_tensors(path, STATE_KEY)
        try:
            return self._load(path, manifest, tensors, identity)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file may hold anything where a number or a tensor is expected
            raise CheckpointError(
                f"{path}: the state of a training is damaged ({type(error).__name__}); delete it to start again"
            ) from error

    def _load(self, path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor], identity: dict[str, Any]) -> int:
        stored = manifest.get("identity", {})
        differing = sorted(name for name in identity if stored.get(name) != identity[name])
        if differing:
            raise CheckpointError(
                f"{path}: the state of a training with another {', '.join(differing)}; delete it to start again, or "
                "write to another file"
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for key in tensors:
            if key.startswith(OPTIMIZER):
                number, name = key.removeprefix(OPTIMIZER).split(".")
                moments.setdefault(int(number), {})[name] = tensors[key]
        self.encoder.load_state_dict(
            {key.removeprefix(ENCODER): t for key, t in tensors.items() if key.startswith(ENCODER)}
        )
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return int(manifest["steps_done"])


def _pixel_error(difference_BCHW: Tensor, scales: int) -> Tensor:
    """Mean square of differences of images, averaged over scales, each half as fine as the one before; a scalar."""
    return torch.stack([F.avg_pool2d(difference_BCHW, 2**k).square().mean() for k in range(scales)]).mean()


def _identity(
    generator: Generator, count: int, first: tuple[str, Tensor], perceptual: Perceptual, settings: EncoderSettings
) -> dict[str, Any]:
    """Everything that a training depends on; of the images only their number and the first one."""
    name, image = first
    return {
        "generator": Checkpoint(generator).manifest()["fingerprint"],
        "perceptual": perceptual.description,
        "images": [count, name, hashlib.sha256(image.float().numpy().tobytes()).hexdigest()],
        "settings": settings.config(),
    }


def _batch(images: NamedImages, step: int, settings: EncoderSettings) -> Tensor:
    """The images of a step [B, 3, H, W]: the next ones in an endless sequence of shuffled epochs."""
    count = len(images)
    places = range(step * settings.batch_size, (step + 1) * settings.batch_size)
    chosen = [_shuffled(settings.seed, place // count, count)[place % count] for place in places]
    return torch.stack([images[i][1] for i in chosen])


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(transform_seed(seed, epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
