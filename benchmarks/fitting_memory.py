"""Peak memory and speed of a few steps of fitting at the published size.

    python -m benchmarks.fitting_memory --images 50

The generator is a config-f StyleGAN2 of 1024 x 1024 pixels with random weights (6080 feature channels), the labels are
random, of 512 x 512 pixels, for ten members; memory depends on sizes only. On a CPU the feature maps take some seconds
per image. Peaks are those of the process, with the interpreter and PyTorch, and on CUDA also of the allocator; Linux
only. With fewer than 50 images, the peak of 50 images on the host is extrapolated and marked so. The last line of the
output is the result as JSON.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import parser, result_name, settings, write_result
from benchmarks.geometries import config_f_channels
from benchmarks.processes import peak_mb, reset_peak
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.fitting import FeatureTable, FitSettings, fit_label_generator
from handsoff_stream.fitting.feature_table import MEMORY_GB_ACCELERATOR, MEMORY_GB_CPU, keep_in_memory
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.tasks import Segmentation

RESOLUTION, SIZE, CLASSES, IMAGES = 1024, (512, 512), 19, 50
PUBLISHED_HIDDEN = (256, 32)
"""The widths of HandsOff's members."""
BYTES_PER_PIXEL = 58
"""Measured: of labels, and of sorting their pixels into regions at its peak."""


def features_in_memory_mb(images: int, memory_gb: float) -> float:
    """Features of so many images that are kept in memory, in MB, with a budget of `memory_gb` GB."""
    needed: dict[int, int] = {}
    for level, channels in enumerate(config_f_channels(RESOLUTION)):
        side = min(4 << level, SIZE[0])  # finer maps are reduced to the size of the labels
        needed[side] = needed.get(side, 0) + 2 * 2 * images * channels * side**2
    levels = list(needed.values())
    return sum(size for size, kept in zip(levels, keep_in_memory(levels, memory_gb), strict=True) if kept) / 1e6


def measure(args: argparse.Namespace, memory_gb: float) -> dict[str, Any]:
    """Peaks in MB and seconds of collecting features and of `--steps` steps of fitting, JSON-able."""
    torch.manual_seed(0)
    generator = StyleGAN2(channels=config_f_channels(RESOLUTION)).eval().requires_grad_(False).to(args.device)
    random = torch.Generator().manual_seed(0)
    w_plus_NLD = torch.randn(args.images, generator.num_ws, generator.w_dim, generator=random)
    targets_NHW = torch.randint(CLASSES, (args.images, *SIZE), generator=random)
    if args.cache_dir is not None:
        args.cache_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    table = FeatureTable.collect(generator, w_plus_NLD, SIZE, memory_gb=memory_gb, cache_dir=args.cache_dir)
    features_s, features_peak_mb = time.perf_counter() - started, peak_mb()
    reset_peak()
    fit_settings = FitSettings(
        hidden=(args.hidden[0], args.hidden[1]),
        members=args.members,
        epochs=2,
        pixels_per_image=-(-args.steps * args.batch_size // (2 * args.images)),
        batch_size=args.batch_size,
        held_out=1e-4,
        patience=2,
    )
    names, palette = [str(i) for i in range(CLASSES)], [(i, i, i) for i in range(CLASSES)]
    _, report = fit_label_generator(table, targets_NHW, Segmentation(names, palette), fit_settings)
    return {
        "images": args.images,
        "channels": sum(generator.feature_channels),
        "features_in_memory_mb": table.bytes_in_memory / 1e6,
        "features_in_files_mb": table.bytes_in_files / 1e6,
        "features_s_an_image": features_s / args.images,
        "features_peak_mb": features_peak_mb,
        "fit_peak_mb": peak_mb(),
        "device_peak_mb": torch.cuda.max_memory_allocated() / 1e6 if table.device.type == "cuda" else None,
        "fit_s_a_step": report.seconds / args.steps,
    }


def extrapolate(measured: dict[str, Any], args: argparse.Namespace, memory_gb: float) -> dict[str, float]:
    """Peaks on the host with `IMAGES` images, from the features kept in memory and from `BYTES_PER_PIXEL`."""
    on_host = torch.device(args.device).type == "cpu"
    more_mb = features_in_memory_mb(IMAGES, memory_gb) - measured["features_in_memory_mb"] if on_host else 0.0
    sorted_mb = (IMAGES - args.images) * SIZE[0] * SIZE[1] * BYTES_PER_PIXEL / 1e6
    return {
        "images": IMAGES,
        "features_peak_mb": measured["features_peak_mb"] + more_mb,
        "fit_peak_mb": measured["fit_peak_mb"] + more_mb + sorted_mb,
    }


def rows(result: Result) -> list[Row]:
    """The peak of the fit."""
    measured, widths = result["measured"], tuple(result["settings"]["hidden"])
    return [
        Row(
            f"fitting at the published size, {measured['images']} images, {measured['channels']} channels, "
            f"{result['settings']['members']} members of {widths}: peak memory",
            f"{measured['fit_peak_mb'] / 1e3:,.3g} GB of the process",
            "DatasetGAN's authors state for 16 images: 160 GB",
            None,
            widths == PUBLISHED_HIDDEN,
        )
    ]


PRESENTATION = Presentation(rows)


def main() -> None:
    """Measure, print a table, and write the result."""
    options = parser(__doc__, name="fitting_memory")
    options.add_argument("--images", type=int, default=4)
    options.add_argument("--steps", type=int, default=16, help="of the fit; each updates all members")
    options.add_argument("--batch-size", type=int, default=256, help="pixels in the minibatch of each member")
    options.add_argument("--members", type=int, default=10)
    options.add_argument("--hidden", type=int, nargs=2, default=PUBLISHED_HIDDEN)
    options.add_argument("--memory-gb", type=float, help="features kept in memory; default: FeatureTable.collect's")
    options.add_argument("--cache-dir", type=Path, help="folder for the features that are not kept in memory")
    args = options.parse_args()
    default = MEMORY_GB_CPU if torch.device(args.device).type == "cpu" else MEMORY_GB_ACCELERATOR
    memory_gb = default if args.memory_gb is None else args.memory_gb
    measured = measure(args, memory_gb)
    table = Table("", "measured", title=f"{args.images} images")
    for name, value in measured.items():
        if value is not None:
            table.add_row(name, f"{value:,.2f}")
    console = Console()
    console.print(table)
    record: dict[str, Any] = {"measured": measured}
    if args.images < IMAGES:
        record["extrapolated"] = extrapolate(measured, args, memory_gb)
        console.print(f"extrapolated to {IMAGES} images: {record['extrapolated']}")
    write_result(result_name(args), {"settings": settings(args), **record})


if __name__ == "__main__":
    main()
