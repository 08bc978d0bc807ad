"""Train a StyleGAN2: on rendered faces out of the box, on a folder of your own images with the same command.

    python examples/train_generator.py runs/faces
    python examples/train_generator.py runs/mine --data photos/ --resolution 256 --images 5000000

Non-saturating logistic loss, lazy R1, style mixing, EMA, minibatch standard deviation (StyleGAN2, Karras et al., CVPR
2020); bfloat16 convolutions. Ctrl-C or SIGTERM stops and saves; the same command resumes from OUT/state.pt, and a
step's random numbers are a function of (seed, step). OUT also gets metrics.jsonl, a sample sheet per `--sheet-every`
images, and generator.safetensors, which handsoff_stream reads. `--stages 32:60000 64:200000 128:400000` trains at low
resolutions first; growing changes neither image nor verdict (see `grow`). Left out: path
length regularisation and adaptive augmentation (a folder of fewer than some 10,000 images will overfit).
"""

import argparse
import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from discriminator import Discriminator
from discriminator import grow as grow_discriminator
from generator_images import RandomOrder, open_data
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from handsoff_stream.checkpoint import Checkpoint, save_checkpoint
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
    start_from: str | None = None
    """A generator file to fine-tune; its discriminator is not in it, so ..."""
    discriminator_first: int = 0
    """... for so many images only the new discriminator learns."""


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
    networks["ema"].load_state_dict(networks["generator"].state_dict())
    return networks


def optimizers(networks: dict[str, Any], settings: Settings) -> dict[str, torch.optim.Adam]:
    """Adam for both; the discriminator's is rescaled for lazy regularisation (SG2, appendix B)."""
    lazy = settings.r1_every / (settings.r1_every + 1)
    return {
        "generator": torch.optim.Adam(networks["generator"].parameters(), lr=settings.lr, betas=(0.0, 0.99)),
        "discriminator": torch.optim.Adam(
            networks["discriminator"].parameters(), lr=settings.lr * lazy, betas=(0.0, 0.99**lazy)
        ),
    }


@torch.no_grad()
def grow(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Networks of twice the resolution that compute what the old ones do: image and verdict do not jump."""
    for name in ("generator", "ema"):
        new[name].load_state_dict(old[name].state_dict(), strict=False)
        for block in new[name].blocks[len(old[name].blocks) :]:
            block.to_rgb.conv.weight.zero_()
    grow_discriminator(old["discriminator"], new["discriminator"])


class Trainer:
    """Networks, optimizers and position; `step` trains on one batch."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype):
        self.settings, self.device, self.dtype = settings, device, dtype
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
        for name in ("generator", "discriminator"):
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
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            lr = optimizer.param_groups[0]["lr"]
            optimizer.load_state_dict(state["optimizers"][name])
            optimizer.param_groups[0]["lr"] = lr

    def step(self, reals_BCHW: Tensor) -> dict[str, float]:
        """One discriminator and one generator update on uint8 images [B, 3, H, W]."""
        started = time.monotonic()
        rng = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.num_steps)
        reals = reals_BCHW.to(self.device).float() / 127.5 - 1
        flip = torch.rand(len(reals), generator=rng).lt(0.5).to(self.device)
        reals = torch.where(flip[:, None, None, None], reals.flip(3), reals)
        metrics = self._discriminator_step(reals, rng)
        if self.num_images >= self.settings.discriminator_first:
            metrics |= self._generator_step(len(reals), rng)
            self._update_ema(len(reals))
        self.num_images += len(reals)
        self.num_steps += 1
        self.seconds += time.monotonic() - started
        return metrics

    def _generate(self, batch: int, rng: torch.Generator) -> Tensor:
        generator = self.networks["generator"]
        z = torch.randn(2, batch, self.settings.z_dim, generator=rng).to(self.device)
        w, other = generator.mapping(z.flatten(0, 1)).unflatten(0, (2, batch))
        generator.w_avg.lerp_(w.detach().mean(dim=0), 0.005)
        # Style mixing (SG1, section 3.1): a second latent takes over from a random layer on.
        first = torch.randint(1, generator.num_ws, (batch, 1), generator=rng)
        first[torch.rand(batch, generator=rng) >= self.settings.mixing] = generator.num_ws
        takes_over = (torch.arange(generator.num_ws) >= first).to(self.device)[:, :, None]
        w_plus = torch.where(takes_over, other[:, None], w[:, None])
        noise = [torch.randn(batch, 1, *size, generator=rng).to(self.device) for size in generator.noise_shapes]
        return generator.synthesis(w_plus, noise, dtype=self.dtype).images

    def _discriminator_step(self, reals: Tensor, rng: torch.Generator) -> dict[str, float]:
        discriminator, optimizer = self.networks["discriminator"], self.optimizers["discriminator"]
        with torch.no_grad():
            fakes = self._generate(len(reals), rng)
        optimizer.zero_grad(set_to_none=True)
        logits_real = discriminator(reals, self.dtype)
        logits_fake = discriminator(fakes, self.dtype)
        loss = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        loss.backward()
        metrics = {"loss_d": loss.item(), "sign_real": logits_real.detach().sign().mean().item()}
        if self.num_steps % self.settings.r1_every == 0:
            reals = reals.detach().requires_grad_()
            (grad,) = torch.autograd.grad(discriminator(reals).sum(), reals, create_graph=True)
            penalty = grad.square().sum(dim=(1, 2, 3)).mean()
            gamma = self.settings.r1 * (self.resolution / self.settings.stages[-1][0]) ** 2
            (penalty * (gamma / 2 * self.settings.r1_every)).backward()
            metrics["r1"] = penalty.item()
        optimizer.step()
        return metrics

    def _generator_step(self, batch: int, rng: torch.Generator) -> dict[str, float]:
        discriminator, optimizer = self.networks["discriminator"], self.optimizers["generator"]
        optimizer.zero_grad(set_to_none=True)
        discriminator.requires_grad_(False)
        loss = F.softplus(-discriminator(self._generate(batch, rng), self.dtype)).mean()
        loss.backward()
        discriminator.requires_grad_(True)
        optimizer.step()
        return {"loss_g": loss.item()}

    @torch.no_grad()
    def _update_ema(self, batch: int) -> None:
        half_life = min(self.settings.ema_images, max(self.num_images * 0.05, 1.0))
        beta = 0.5 ** (batch / half_life)
        ema, generator = self.networks["ema"], self.networks["generator"]
        torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), 1 - beta)
        for mine, theirs in zip(ema.buffers(), generator.buffers(), strict=True):
            mine.copy_(theirs)


@torch.no_grad()
def save_sheet(generator: StyleGAN2, path: Path, *, psi: float = 0.7, rows: int = 8) -> None:
    """PNG of rows x rows samples of fixed latents, truncated like the stream's default."""
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(rows * rows, generator.z_dim, generator=rng)
    device = generator.w_avg.device
    w_plus = generator.truncate(generator.mapping(z.to(device)), psi)
    images = torch.cat([generator.synthesis(w).images.cpu() for w in w_plus.split(rows)])
    tiles = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).unflatten(0, (rows, rows))
    Image.fromarray(tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()).save(path)


def save_state(trainer: Trainer, out: Path) -> None:
    """state.pt and generator.safetensors, each whole or not at all."""
    partial = out / "state.pt.partial"
    torch.save(trainer.state_dict(), partial)
    partial.replace(out / "state.pt")
    provenance: dict[str, Any] = {
        "images": trainer.num_images,
        "seconds": round(trainer.seconds),
        "torch": torch.__version__,
    }
    data = "rendered faces" if trainer.settings.data is None else Path(trainer.settings.data).name
    settings = asdict(trainer.settings) | {"data": data}
    provenance |= {"trained_by": "examples/train_generator.py", "settings": settings}
    save_checkpoint(out / "generator.safetensors", Checkpoint(trainer.networks["ema"], provenance=provenance))


def train(settings: Settings, out: Path, args: argparse.Namespace) -> None:
    """Run or resume until the last stage is done (or `--seconds` are over), saving as it goes."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    trainer = Trainer(settings, device, torch.bfloat16)
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        trainer.load_state_dict(state)
        print(f"resuming at {trainer.num_images} images, resolution {trainer.resolution}")
    deadline = time.monotonic() + args.seconds
    for resolution, until in settings.stages:
        if trainer.num_images >= until:
            continue
        if resolution != trainer.resolution:
            trainer.enter_stage(resolution)
        try:
            finished = train_stage(trainer, until, out, args, deadline)
        except KeyboardInterrupt:
            finished = False
        if not finished:
            break
    save_state(trainer, out)
    save_sheet(trainer.networks["ema"], out / f"samples_{trainer.num_images:08d}.png")


def train_stage(trainer: Trainer, until: int, out: Path, args: argparse.Namespace, deadline: float) -> bool:
    """Train one stage; True if it was finished, False if the time was up first."""
    data = cast(Any, open_data(trainer.settings.data, trainer.resolution))
    order = RandomOrder(len(data), trainer.settings.seed, trainer.num_images)
    loader = DataLoader(data, trainer.settings.batch, sampler=order, num_workers=args.workers, persistent_workers=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    next_sheet = (trainer.num_images // args.sheet_every + 1) * args.sheet_every
    started, images_before = time.monotonic(), trainer.num_images
    with Progress(*columns) as progress, (out / "metrics.jsonl").open("a") as log:
        bar = progress.add_task(f"{trainer.resolution}x{trainer.resolution}", total=until)
        for reals in loader:
            if reals.shape[-1] != trainer.resolution:
                reals = F.adaptive_avg_pool2d(reals.float(), trainer.resolution)
            metrics = trainer.step(reals)
            progress.update(bar, completed=trainer.num_images)
            if trainer.num_steps % 16 == 1:
                rate = (trainer.num_images - images_before) / (time.monotonic() - started)
                row = {
                    "images": trainer.num_images,
                    "resolution": trainer.resolution,
                    "images_per_s": rate,
                    **metrics,
                }
                log.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
                log.flush()
            if trainer.num_images >= next_sheet:
                save_state(trainer, out)
                save_sheet(trainer.networks["ema"], out / f"samples_{trainer.num_images:08d}.png")
                next_sheet += args.sheet_every
            if trainer.num_images >= until:
                return True
            if time.monotonic() > deadline:
                return False
    return True


def stage(text: str) -> tuple[int, int]:
    """ "64:200000" => (64, 200000)."""
    resolution, until = map(int, text.split(":"))
    if resolution < 8 or resolution & (resolution - 1):
        raise argparse.ArgumentTypeError(f"resolution {resolution} is not a power of two of at least 8")
    return resolution, until


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run; an existing run is resumed")
    parser.add_argument("--data", help="image folder, or uint8 [N,3,H,W] .npy; default: rendered faces")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--images", type=int, default=400_000, help="images to train on in all")
    parser.add_argument("--stages", type=stage, nargs="*", help="RESOLUTION:UNTIL_IMAGES ...; overrides the two above")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="*", default=[128, 128, 128, 128, 64, 32])
    parser.add_argument("--z-dim", type=int, default=128)
    parser.add_argument("--mapping-layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--r1", type=float, default=0.5)
    parser.add_argument("--r1-every", type=int, default=16)
    parser.add_argument("--mixing", type=float, default=0.5)
    parser.add_argument("--ema-images", type=float, default=10_000.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", metavar="FILE", help="fine-tune the generator of this file or checkpoint")
    parser.add_argument("--discriminator-first", type=int, default=0, metavar="IMAGES", help="with --start-from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sheet-every", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long; run again to go on")
    args = parser.parse_args()
    stages = tuple(args.stages or [(args.resolution, args.images)])
    if len(args.channels) < stages[-1][0].bit_length() - 2:
        parser.error(f"--channels names {len(args.channels)} resolutions; {stages[-1][0]} needs one for each from 4 on")
    names = [
        *("data", "batch", "z_dim", "mapping_layers", "lr", "r1", "r1_every", "mixing", "ema_images", "seed"),
        *("start_from", "discriminator_first"),
    ]
    settings = Settings(stages=stages, channels=tuple(args.channels), **{name: getattr(args, name) for name in names})
    # What schedulers send before they kill, and what a shell's background jobs otherwise ignore.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    train(settings, args.out, args)


if __name__ == "__main__":
    main()
