"""Checkpoints to measure with: an existing one, or a config-f StyleGAN2 of any resolution with random weights.

Speed and memory depend on the geometry and not on the values of the weights. Labels have the sizes of HandsOff's
published configurations. Knows StyleGAN2's channel table. Does not know what is measured.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from handsoff_stream.checkpoint import Checkpoint, Head, save_checkpoint
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.tasks import Segmentation

PREFIX = "config-f-"
RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512, 1024)
MAX_CHANNELS = 512
MAX_LABEL_SIZE = 512
"""HandsOff labels the images of a 1024 x 1024 generator at 512 x 512 pixels."""
HEAD: dict[str, Any] = {"hidden": (256, 32), "members": 10, "classes": 19}
"""HandsOff's head for CelebAMask-HQ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint`, and the description of the head of a checkpoint with random weights."""
    parser.add_argument("--checkpoint", default="faces", help='name, path, or "config-f-R": random weights, R x R')
    parser.add_argument("--hidden", type=int, nargs=2, help="widths of a head with random weights (default: 256 32)")
    parser.add_argument("--members", type=int, help="of a head with random weights (default: 10)")
    parser.add_argument("--classes", type=int, help="of a head with random weights (default: 19)")


def checkpoint_path(args: argparse.Namespace, folder: Path) -> str:
    """The name or path of the checkpoint that `add_arguments`'s arguments ask for.

    Args:
        args: the parsed arguments.
        folder: a checkpoint with random weights is written here.

    Raises:
        ValueError: "config-f-" is not followed by a power of two from 8 to 1024, or a head is described for a
            checkpoint that has its own.
    """
    name = str(args.checkpoint)
    given = {key: getattr(args, key) for key in HEAD if getattr(args, key) is not None}
    if name.startswith(PREFIX):
        path = folder / f"{name}.safetensors"
        save_checkpoint(path, random_checkpoint(_resolution(name), **{**HEAD, **given}))
        return str(path)
    if given:
        raise ValueError(
            f"{given} describes a head, but {name!r} has its own; drop it, or pass --checkpoint {PREFIX}256"
        )
    return name


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sizes that decide speed and memory, JSON-able: of images, labels and heads."""
    heads = {name: head.label_generator.config() for name, head in checkpoint.heads.items()}
    for config in heads.values():
        config["feature_channels"] = sum(config["feature_channels"])
    return {"image": list(checkpoint.generator.resolution), "label": list(checkpoint.size), "heads": heads}


def _resolution(name: str) -> int:
    digits = name.removeprefix(PREFIX)
    if not digits.isdecimal() or int(digits) not in RESOLUTIONS:
        raise ValueError(f"{name!r} names no geometry; pass {PREFIX}R with R one of {RESOLUTIONS}")
    return int(digits)


def config_f_channels(resolution: int) -> tuple[int, ...]:
    """Channels per resolution from 4 x 4 upwards, as in config F of StyleGAN2 (Karras et al., CVPR 2020).

    512 up to 64 x 64 pixels, then half as many with each doubling of the resolution.
    """
    sizes = [2**level for level in range(2, resolution.bit_length())]
    return tuple(min(MAX_CHANNELS, 32768 // size) for size in sizes)


def random_checkpoint(
    resolution: int,
    *,
    hidden: Sequence[int],
    members: int,
    classes: int,
    channels: Sequence[int] | None = None,
    latent: int = 512,
) -> Checkpoint:
    """A segmentation checkpoint with random weights of a fixed seed.

    Args:
        resolution: height and width of the images in pixels; labels have at most 512 x 512.
        channels: per resolution from 4 x 4 upwards; None: those of config F.
        hidden: the two widths of the head.
        members: of the head.
        classes: of the head.
        latent: dimensions of z and of w.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = tuple(channels or config_f_channels(resolution))
        generator = StyleGAN2(channels=sizes, z_dim=latent, w_dim=latent).eval().requires_grad_(False)
    label_generator = LabelGenerator(generator.feature_channels, (hidden[0], hidden[1]), classes, members)
    names = tuple(f"class {k}" for k in range(classes))
    task = Segmentation(names, tuple((k, k, k) for k in range(classes)))
    size = min(resolution, MAX_LABEL_SIZE)
    head = Head(task, label_generator.eval().requires_grad_(False))
    return Checkpoint(generator, {"segmentation": head}, output_size=(size, size))
