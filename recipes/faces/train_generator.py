"""Train a StyleGAN2: on rendered faces out of the box, on a folder of your own images with the same command.

    python recipes/faces/train_generator.py runs/faces
    python recipes/faces/train_generator.py runs/mine --data photos/ --resolution 256 --images 5000000
    torchrun --nproc-per-node 8 recipes/faces/train_generator.py runs/mine --data photos/ --resolution 256

Non-saturating logistic loss, lazy R1, style mixing, EMA, minibatch standard deviation (StyleGAN2, Karras et al., CVPR
2020); bfloat16 convolutions. Ctrl-C or SIGTERM stops after the step and saves; the same command resumes from
OUT/state.pt. OUT also gets metrics.jsonl, a sample sheet per `--sheet-every` images, and generator.safetensors, which
handsoff_stream reads. Under torchrun the processes share each batch: on GPUs, or on a CPU's cores (OMP_NUM_THREADS=1).
`--stages 32:60000 64:200000 128:400000` trains at low resolutions first; growing changes neither image nor verdict.
`--autoencode 30` adds an encoder and asks that real images come out of their own codes (VAE/GAN, Larsen et al., ICML
2016): where compute is short, samples vary more. Left out: path length regularisation and adaptive
augmentation (a folder of fewer than some 10,000 images will overfit).
"""

import argparse
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gan_networks import Settings
from gan_trainer import Trainer
from generator_images import RandomOrder, open_data
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from handsoff_stream.checkpoint import Checkpoint, save_checkpoint
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.precision import cpu_multiplies_bfloat16

SAVE_SECONDS = 300.0


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
    provenance |= {"trained_by": "recipes/faces/train_generator.py", "settings": settings}
    save_checkpoint(out / "generator.safetensors", Checkpoint(trainer.networks["ema"], provenance=provenance))


class Stop:
    """Whether to stop after this step: SIGINT or SIGTERM came, or the time is up, for any process of the group."""

    def __init__(self, seconds: float):
        self.deadline, self.asked = time.monotonic() + seconds, False
        # What schedulers send before they kill, and what a shell's background jobs otherwise ignore.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)  # a second one kills

    def __call__(self, device: torch.device) -> bool:
        stop = self.asked or time.monotonic() > self.deadline
        if dist.is_initialized():
            any_stop = torch.tensor(float(stop), device=device)
            dist.all_reduce(any_stop, dist.ReduceOp.MAX)
            stop = bool(any_stop)
        return stop


def train(settings: Settings, out: Path, args: argparse.Namespace) -> None:
    """Run or resume until the last stage is done (or `--seconds` are over), saving as it goes."""
    stop = Stop(args.seconds)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    bfloat16 = device.type != "cpu" or cpu_multiplies_bfloat16()
    trainer = Trainer(settings, device, torch.bfloat16 if bfloat16 else torch.float32, compiled=args.compile)
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        trainer.load_state_dict(state)
        if trainer.rank == 0:
            print(f"resuming at {trainer.num_images} images, resolution {trainer.resolution}")
    for resolution, until in settings.stages:
        if trainer.num_images >= until:
            continue
        if resolution != trainer.resolution:
            trainer.enter_stage(resolution)
        if not train_stage(trainer, until, out, args, stop):
            break
    if trainer.rank == 0:
        save_state(trainer, out)
        save_sheet(trainer.networks["ema"], out / f"samples_{trainer.num_images:08d}.png")


def train_stage(trainer: Trainer, until: int, out: Path, args: argparse.Namespace, stop: Stop) -> bool:
    """Train one stage; True if it was finished, False if it was stopped first."""
    data = cast(Any, open_data(trainer.settings.data, trainer.resolution, rare=trainer.settings.rare))
    rank, world = trainer.rank, trainer.world
    order = RandomOrder(len(data), trainer.settings.seed, trainer.num_images, rank=rank, world=world)
    loader = DataLoader(data, trainer.settings.batch // world, sampler=order, num_workers=args.workers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    next_sheet = (trainer.num_images // args.sheet_every + 1) * args.sheet_every
    started, images_before = time.monotonic(), trainer.num_images
    next_save = started + SAVE_SECONDS
    log_path = out / "metrics.jsonl" if rank == 0 else Path(os.devnull)
    with Progress(*columns, disable=rank > 0) as progress, log_path.open("a") as log:
        bar = progress.add_task(f"{trainer.resolution}x{trainer.resolution}", total=until)
        for reals in loader:
            if reals.shape[-1] != trainer.resolution:
                reals = F.adaptive_avg_pool2d(reals.float(), trainer.resolution)
            metrics = trainer.step(reals)
            progress.update(bar, completed=trainer.num_images)
            if trainer.num_steps % 16 == 1:
                rate = (trainer.num_images - images_before) / (time.monotonic() - started)
                row: dict[str, Any] = {
                    "images": trainer.num_images,
                    "resolution": trainer.resolution,
                    "images_per_s": rate,
                    **metrics,
                }
                log.write(json.dumps({k: round(float(v), 4) for k, v in row.items()}) + "\n")
                log.flush()
            if rank == 0 and time.monotonic() > next_save:
                save_state(trainer, out)
                next_save = time.monotonic() + SAVE_SECONDS
            if trainer.num_images >= next_sheet:
                if rank == 0:
                    save_state(trainer, out)
                    save_sheet(trainer.networks["ema"], out / f"samples_{trainer.num_images:08d}.png")
                next_sheet += args.sheet_every
            if trainer.num_images >= until:
                return True
            if stop(trainer.device):
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
    parser.add_argument("--rare", type=float, default=0.05, help="rendered faces: share with glasses, and with hats")
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
    parser.add_argument("--autoencode", type=float, default=0.0, metavar="WEIGHT", help="VAE/GAN term; try 30")
    parser.add_argument("--autoencode-first", type=int, default=0, metavar="IMAGES", help="no discriminator until then")
    parser.add_argument("--kl", type=float, default=5e-4, help="with --autoencode: weight of a nat")
    parser.add_argument("--start-from", metavar="FILE", help="fine-tune the generator of this file or checkpoint")
    parser.add_argument("--discriminator-first", type=int, default=0, metavar="IMAGES", help="with --start-from")
    parser.add_argument("--projected", type=float, default=0.0, metavar="WEIGHT", help="heads on ImageNet features")
    parser.add_argument("--hinge-bound", type=float, default=0.6, help="heads with a smaller loss are not updated")
    parser.add_argument("--halvings", type=int, default=0, help="of images before the own discriminator sees them")
    parser.add_argument("--compile", action="store_true", help="compile element-wise passes: see fused_synthesis.py")
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
        *("autoencode", "autoencode_first", "kl", "start_from", "discriminator_first", "rare"),
        *("projected", "hinge_bound", "halvings"),
    ]
    settings = Settings(stages=stages, channels=tuple(args.channels), **{name: getattr(args, name) for name in names})
    if "RANK" in os.environ:  # torchrun
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        if args.batch % dist.get_world_size():
            parser.error(f"--batch {args.batch} cannot be shared by {dist.get_world_size()} processes")
    train(settings, args.out, args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
