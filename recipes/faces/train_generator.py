"""Train a StyleGAN2: on rendered faces out of the box, on a folder of your own images with the same command.

    python -m recipes.faces.train_generator runs/faces
    python -m recipes.faces.train_generator runs/mine --data photos/ --resolution 256 --images 5000000
    torchrun --nproc-per-node 8 -m recipes.faces.train_generator runs/mine --data photos/ --resolution 256

Non-saturating logistic loss, lazy R1, style mixing, EMA, minibatch standard deviation (StyleGAN2, Karras et al., CVPR
2020); bfloat16 convolutions. Ctrl-C or SIGTERM saves the run and stops after the current step; the same command resumes
it from OUT/state.pt. OUT also receives metrics.jsonl, a sample sheet every `--sheet-every` images, and
generator.safetensors, which handsoff_stream reads. Under torchrun the processes share each batch, on GPUs or on the
cores of a CPU (OMP_NUM_THREADS=1). `--stages 32:60000 64:200000 128:400000` trains at low resolutions first; a change
of resolution changes neither images nor logits. `--autoencode 30` adds an encoder and a loss for reconstructing real
images from their codes (VAE/GAN, Larsen et al., ICML 2016): in short trainings, samples vary more with it. Path length
regularization and adaptive augmentation are left out, so training on fewer than about 10,000 images will overfit.
"""

import argparse
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from handsoff_stream.checkpoint import Checkpoint, save_checkpoint
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.files.atomic import whole_file
from handsoff_stream.generators import Generator
from handsoff_stream.precision import cpu_multiplies_bfloat16
from recipes.faces.gan_networks import Settings
from recipes.faces.gan_trainer import Trainer
from recipes.faces.gate import Gate
from recipes.faces.generator_images import RandomOrder, open_data
from recipes.faces.quality import look_at, open_teacher

SAVE_SECONDS = 300.0
MAX_ROLLBACKS = 4  # to the same good state; each one halves the weight of the heads


@torch.no_grad()
def save_sheet(generator: Generator, path: Path, *, psi: float = 0.7, rows: int = 8) -> None:
    """Write a PNG of rows x rows samples of fixed latents, truncated with psi."""
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(rows * rows, generator.z_dim, generator=rng)
    device = generator.w_avg.device
    w_plus = generator.truncate(generator.mapping(z.to(device)), psi)
    images = torch.cat([generator.synthesis(w).images.cpu() for w in w_plus.split(rows)])
    tiles = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).unflatten(0, (rows, rows))
    Image.fromarray(tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()).save(path)


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write a state dict with `torch.save`; the file appears whole or not at all."""
    with whole_file(path) as partial:
        torch.save(state, partial)


def save_generator(trainer: Trainer, path: Path) -> None:
    """Write the averaged generator as a checkpoint without heads."""
    provenance: dict[str, Any] = {
        "images": trainer.num_images,
        "seconds": round(trainer.seconds),
        "torch": torch.__version__,
    }
    data = "rendered faces" if trainer.settings.data is None else Path(trainer.settings.data).name
    settings = asdict(trainer.settings) | {"data": data}
    provenance |= {"trained_by": "recipes/faces/train_generator.py", "settings": settings}
    save_checkpoint(path, Checkpoint(trainer.networks["ema"], provenance=provenance))


def save_state(trainer: Trainer, out: Path) -> None:
    """Write state.pt and generator.safetensors, each of them whole or not at all."""
    save_whole(trainer.state_dict(), out / "state.pt")
    save_generator(trainer, out / "generator.safetensors")


class Stop:
    """Whether to stop after this step: a process of the group received SIGINT or SIGTERM, or its time is over."""

    def __init__(self, seconds: float):
        self.deadline, self.asked = time.monotonic() + seconds, False
        # Schedulers send SIGTERM before they kill a job; background jobs of a shell ignore SIGINT by default.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    def __call__(self, device: torch.device) -> bool:
        stop = self.asked or time.monotonic() > self.deadline
        if dist.is_initialized():
            any_stop = torch.tensor(float(stop), device=device)
            dist.all_reduce(any_stop, dist.ReduceOp.MAX)
            stop = bool(any_stop)
        return stop


class Run:
    """A training run and its folder: trains stage by stage, saves the state regularly, and runs the gate.

    Args:
        settings: of the training; a run that `out` already holds is resumed with these settings.
        out: folder of the run.
        args: the command line.
    """

    def __init__(self, settings: Settings, out: Path, args: argparse.Namespace):
        self.stop = Stop(args.seconds)
        self.out, self.args = out, args
        out.mkdir(parents=True, exist_ok=True)
        device = torch.device(args.device)
        bfloat16 = device.type != "cpu" or cpu_multiplies_bfloat16()
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.trainer = Trainer(settings, device, dtype, compiled=args.compile)
        self.leads = self.trainer.rank == 0
        if (out / "state.pt").exists():
            self.trainer.load_state_dict(self.load("state.pt"))
            if self.leads:
                print(f"resuming at {self.trainer.num_images} images, resolution {self.trainer.resolution}")
        self.gate = self.open_gate() if args.gate and self.leads else None

    def load(self, name: str) -> dict[str, Any]:
        """A state dict from the folder of the run."""
        state: dict[str, Any] = torch.load(self.out / name, map_location=self.trainer.device, weights_only=True)
        return state

    def save(self) -> None:
        """Write the state and the averaged generator."""
        save_state(self.trainer, self.out)

    def save_with_sheet(self) -> None:
        """Write the state, the averaged generator and a sheet of its samples."""
        self.save()
        save_sheet(self.trainer.networks["ema"], self.out / f"samples_{self.trainer.num_images:08d}.png")

    def open_gate(self) -> Gate:
        """The gate of this run, with its teacher and reference renders."""
        args, device = self.args, self.trainer.device
        size = self.trainer.settings.stages[-1][0]
        teacher = open_teacher(
            args.teacher or self.out / "teacher.safetensors", args.teacher_steps, device, varied=args.varied
        )
        faces = RenderedFaces(
            "validation", num_images=args.gate_samples, size=size, glasses=args.rare, hat=args.rare, varied=args.varied
        )
        real = (images.to(device) for images, _ in DataLoader(faces, batch_size=16))
        return Gate(self.out / "gate.jsonl", teacher, *look_at(real, teacher))

    def train(self) -> None:
        """Train until the last stage is finished, `--seconds` are over, or a signal arrives."""
        if self.args.gate and self.first_process_says(self.gate is not None and not self.gate.readings):
            self.ask_gate()  # the first reading is what later ones are compared with
        for resolution, until in self.trainer.settings.stages:
            if self.trainer.num_images >= until:
                continue
            if resolution != self.trainer.resolution:
                self.trainer.enter_stage(resolution)
            if not self.train_stage(until):
                break
        if self.leads:
            self.save_with_sheet()

    def train_stage(self, until: int) -> bool:
        """Train one stage; True if it was finished, False if it was stopped first."""
        trainer, args = self.trainer, self.args
        data = cast(
            Any,
            open_data(
                trainer.settings.data, trainer.resolution, rare=trainer.settings.rare, varied=trainer.settings.varied
            ),
        )
        order = RandomOrder(
            len(data), trainer.settings.seed, trainer.num_images, rank=trainer.rank, world=trainer.world
        )
        loader = DataLoader(data, trainer.settings.batch // trainer.world, sampler=order, num_workers=args.workers)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        next_save, started, images_before = time.monotonic() + SAVE_SECONDS, time.monotonic(), trainer.num_images
        log_path = self.out / "metrics.jsonl" if self.leads else Path(os.devnull)
        with Progress(*columns, disable=not self.leads) as progress, log_path.open("a") as log:
            bar = progress.add_task(f"{trainer.resolution}x{trainer.resolution}", total=until)
            for reals in loader:
                if reals.shape[-1] != trainer.resolution:
                    reals = F.adaptive_avg_pool2d(reals.float(), trainer.resolution)
                before = trainer.num_images
                metrics = trainer.step(reals)
                progress.update(bar, completed=trainer.num_images)
                if trainer.num_steps % 16 == 1:
                    rate = (trainer.num_images - images_before) / (time.monotonic() - started)
                    write_metrics(log, trainer, rate, metrics)
                if self.leads and crossed(before, trainer.num_images, args.sheet_every):
                    self.save_with_sheet()
                elif self.leads and time.monotonic() > next_save:
                    self.save()
                    next_save = time.monotonic() + SAVE_SECONDS
                if args.gate and crossed(before, trainer.num_images, args.gate):
                    self.ask_gate()
                if trainer.num_images >= until:
                    return True
                if self.stop(trainer.device):
                    return False
        return True

    def first_process_says(self, flag: bool) -> bool:
        """The flag of the first process, on all processes of the group."""
        shared = torch.tensor(float(flag), device=self.trainer.device)
        if dist.is_initialized():
            dist.broadcast(shared, src=0)
        return bool(shared)

    def ask_gate(self) -> None:
        """Keep the state as the last good one if the generator passes; otherwise return to the last good state.

        All processes of a group do the same.

        Raises:
            SystemExit: the run failed too often after the same good state.
        """
        collapsed = False
        if self.gate is not None:
            ema = self.trainer.networks["ema"]
            reading = self.gate.read(ema, self.trainer.num_images)
            collapsed = reading.reason is not None
            print(f"{reading.images} images: {reading.quality.row()}; {reading.reason or 'passes'}", flush=True)
            if reading.reason is None:
                save_whole(self.trainer.state_dict(), self.out / "good.pt")
            if self.gate.is_best(reading):
                save_generator(self.trainer, self.out / "best.safetensors")
        if self.first_process_says(collapsed):
            good = self.load("good.pt")
            if self.trainer.num_rollbacks - good["rollbacks"] >= MAX_ROLLBACKS:
                raise SystemExit(
                    f"the run collapsed {MAX_ROLLBACKS + 1} times after its last good state, {self.out / 'good.pt'}; "
                    "see gate.jsonl, and resume it with a smaller --projected or --lr"
                )
            self.trainer.roll_back(good)


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def write_metrics(log: TextIO, trainer: Trainer, rate: float, metrics: dict[str, torch.Tensor]) -> None:
    """Append one line of JSON to the log; `rate`: images per second."""
    row: dict[str, Any] = {"images": trainer.num_images, "resolution": trainer.resolution, "images_per_s": rate}
    log.write(json.dumps({k: round(float(v), 4) for k, v in (row | metrics).items()}) + "\n")
    log.flush()


def stage(text: str) -> tuple[int, int]:
    """ "64:200000" => (64, 200000)."""
    resolution, until = map(int, text.split(":"))
    if resolution < 8 or resolution & (resolution - 1):
        raise argparse.ArgumentTypeError(f"resolution {resolution} is not a power of two of at least 8")
    return resolution, until


def command_line() -> argparse.ArgumentParser:
    """The options of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run; an existing run is resumed")
    parser.add_argument("--data", help="image folder, or uint8 [N,3,H,W] .npy; default: rendered faces")
    parser.add_argument("--rare", type=float, default=0.05, help="share of rendered faces with glasses, and with hats")
    parser.add_argument("--varied", action="store_true", help="use the varied rendered faces")
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
    parser.add_argument(
        "--autoencode-first",
        type=int,
        default=0,
        metavar="IMAGES",
        help="train without discriminator for so many images",
    )
    parser.add_argument("--kl", type=float, default=5e-4, help="with --autoencode: weight per nat")
    parser.add_argument("--start-from", metavar="FILE", help="fine-tune the generator of this file or checkpoint")
    parser.add_argument(
        "--discriminator-first",
        type=int,
        default=0,
        metavar="IMAGES",
        help="with --start-from: train the discriminator alone for so many images",
    )
    parser.add_argument("--projected", type=float, default=0.0, metavar="WEIGHT", help="heads on ImageNet features")
    parser.add_argument("--hinge-bound", type=float, default=0.6, help="heads with a smaller loss are not updated")
    parser.add_argument("--halvings", type=int, default=0, help="how often images are halved for the discriminator")
    parser.add_argument("--compile", action="store_true", help="compile element-wise passes: see fused_synthesis.py")
    parser.add_argument(
        "--gate", type=int, default=0, metavar="IMAGES", help="run the gate every so many images; see gate.py"
    )
    parser.add_argument("--gate-samples", type=int, default=1000, help="generated and rendered images of a reading")
    parser.add_argument("--teacher", type=Path, help="file of the gate's teacher, written if absent; default: in OUT")
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sheet-every", type=int, default=10_000)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this time; run again to continue"
    )
    return parser


def main() -> None:
    """Train, or resume, the run that the command line describes."""
    parser = command_line()
    args = parser.parse_args()
    stages = tuple(args.stages or [(args.resolution, args.images)])
    if len(args.channels) < stages[-1][0].bit_length() - 2:
        parser.error(f"--channels names {len(args.channels)} resolutions; {stages[-1][0]} needs one for each from 4 on")
    names = [
        *("data", "batch", "z_dim", "mapping_layers", "lr", "r1", "r1_every", "mixing", "ema_images", "seed"),
        *("autoencode", "autoencode_first", "kl", "start_from", "discriminator_first", "rare", "varied"),
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
    Run(settings, args.out, args).train()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
