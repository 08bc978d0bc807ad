"""handsoff-stream: each verb is a few lines over a function that scripts can call as well.

Knows arguments, progress bars and exit codes. A user's mistake ends in one sentence on stderr and exit code 2; a
traceback is a bug of ours.
"""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from handsoff_stream.errors import StreamError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Endless labelled images from a StyleGAN2 and at most 50 labelled ones, synthesised while you train.",
)
console = Console()

CheckpointArgument = Annotated[str, typer.Argument(help="A name that ships (faces) or a .safetensors file.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: CUDA if there is one.")]
SeedOption = Annotated[int, typer.Option(help="Which stream; in [0, 2**64).")]

# What a user can get wrong. Anything else is a defect of this program and keeps its traceback.
USER_ERRORS = (ValueError, OSError, StreamError, ImportError)


def plain_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn expected errors into one sentence and exit code 2."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except USER_ERRORS as error:
            if isinstance(error, ImportError):
                error = ImportError(f"{error}; install the optional parts with pip install 'handsoff_stream[all]'")
            print(f"handsoff-stream: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


@app.command(epilog="Example: `handsoff-stream inspect faces`")
@plain_errors
def inspect(checkpoint: CheckpointArgument) -> None:
    """Say what a checkpoint or generator file is."""
    from handsoff_stream.describe import describe

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in describe(checkpoint).items():
        table.add_row(name, value)
    console.print(table)


@app.command(epilog="Example: `handsoff-stream convert stylegan2-ffhq-config-f.pt ffhq.safetensors`")
@plain_errors
def convert(
    generator: Annotated[Path, typer.Argument(help="Published generator file: .pt, .pth or .pkl.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors.")],
    average_latent: Annotated[Path | None, typer.Option(help=".npy file, where the generator stores none.")] = None,
    half: Annotated[bool, typer.Option(help="Store weights as float16.")] = False,
) -> None:
    """Rewrite a published generator file as a checkpoint, which holds nothing but numbers."""
    from handsoff_stream.checkpoint import import_generator, save_checkpoint

    save_checkpoint(out, import_generator(generator, average_latent=average_latent), half=half)
    console.print(f"wrote {out}")


@app.command(epilog="Example: `handsoff-stream preview faces sheet.png --num 24 --seed 7`")
@plain_errors
def preview(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    num: Annotated[int, typer.Option(help="Samples on the sheet.")] = 16,
    seed: SeedOption = 0,
    truncation: Annotated[float | None, typer.Option(help="psi; default: the checkpoint's.")] = None,
    device: DeviceOption = None,
) -> None:
    """Draw a sheet: images, label overlays, uncertainty maps; rejected samples are marked."""
    from handsoff_stream.preview import preview_sheet

    preview_sheet(checkpoint, out, num=num, seed=seed, truncation=truncation, device=device)
    console.print(f"wrote {out}")


@app.command(epilog="Example: `handsoff-stream invert faces photos/ latents/ --steps 500`")
@plain_errors
def invert(
    generator: Annotated[str, typer.Argument(help="Generator or checkpoint file, or a name that ships.")],
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    out: Annotated[Path, typer.Argument(help="Folder for one .safetensors file an image; finished ones are kept.")],
    fit: Annotated[str, typer.Option(help="Images of another size: exact (refuse), crop or pad.")] = "exact",
    steps: Annotated[int, typer.Option(help="Gradient steps an image.")] = 500,
    net: Annotated[str | None, typer.Option(help="LPIPS backbone: vgg, alex or squeeze.")] = None,
    device: DeviceOption = None,
) -> None:
    """Find the latents of real images; run again to continue an interrupted run."""
    from handsoff_stream.fitting.commands import invert_folder

    found = invert_folder(generator, images, out, steps=steps, net=net, device=device, fit=fit)  # type: ignore[arg-type]
    table = Table("image", "LPIPS", "PSNR (dB)")
    for name, lpips, psnr in found:
        table.add_row(name, f"{lpips:.3f}", f"{psnr:.1f}")
    console.print(table)


@app.command(
    epilog="Example: `handsoff-stream fit ffhq.pt --images photos/ --labels masks/ "
    "--class-map celebamask_hq_8 --label-size 512 --out mine.safetensors`"
)
@plain_errors
def fit(
    generator: Annotated[str, typer.Argument(help="Generator or checkpoint file, or a name that ships.")],
    images: Annotated[Path, typer.Option(help="Folder of at most about 50 labelled images, or a .csv/.json manifest.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    labels: Annotated[Path | None, typer.Option(help="Folder of masks (PNG or .npy), matched by name.")] = None,
    class_map: Annotated[str | None, typer.Option(help="What ids or colours mean: a map that ships, or YAML.")] = None,
    classes: Annotated[str | None, typer.Option(help="Or, for plain ids: names in their order, with commas.")] = None,
    fit: Annotated[str, typer.Option(help="Images of another size: exact (refuse), crop or pad.")] = "exact",
    crop_box: Annotated[str | None, typer.Option(help="TOP,LEFT,BOTTOM,RIGHT in pixels, cut out first.")] = None,
    label_size: Annotated[int | None, typer.Option(help="Height of the labels; default: the generator's.")] = None,
    smallest_region: Annotated[int, typer.Option(help="Smaller specks in masks become unlabelled; HandsOff: 30.")] = 0,
    latents: Annotated[Path | None, typer.Option(help="Folder of inversions; default: OUT.latents/.")] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps an image; inversions that exist are used.")] = 500,
    net: Annotated[str | None, typer.Option(help="LPIPS backbone: vgg, alex or squeeze.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of fitting; default: see FitSettings.")] = None,
    half: Annotated[bool, typer.Option(help="Store weights as float16.")] = False,
    device: DeviceOption = None,
) -> None:
    """Learn to label what a generator makes, from a few labelled images; writes a checkpoint to stream from."""
    from handsoff_stream.fitting import FitSettings
    from handsoff_stream.fitting.commands import LabelledFiles, fit_folder, open_class_map

    accuracy, unseen = fit_folder(
        generator,
        LabelledFiles(
            images=images,
            labels=labels,
            class_map=open_class_map(class_map, classes),
            fit=fit,  # type: ignore[arg-type]
            label_height=label_size,
            crop_box=crop_box,
            smallest_region=smallest_region,
        ),
        out,
        latents=latents,
        steps=steps,
        net=net,
        settings=FitSettings() if epochs is None else FitSettings(epochs=epochs),
        half=half,
        device=device,
    )
    note = "" if accuracy is None else f"; accuracy on held-out pixels of the labelled images {accuracy:.1%}"
    console.print(f"wrote {out}{note}")
    if unseen:
        console.print(f"no labelled image shows {', '.join(unseen)}, so the stream never will")


@app.command(epilog="Example: `handsoff-stream sample ffhq.pt to_annotate/ --num 16`")
@plain_errors
def sample(
    generator: Annotated[str, typer.Argument(help="Generator or checkpoint file, or a name that ships.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an unfinished one continues.")],
    num: Annotated[int, typer.Option(help="Images to annotate.")] = 12,
    candidates: Annotated[
        int | None, typer.Option(help="Select actively among so many (DatasetGAN); needs a checkpoint with a head.")
    ] = None,
    seed: SeedOption = 0,
    truncation: Annotated[float | None, typer.Option(help="psi; default: the checkpoint's.")] = None,
    device: DeviceOption = None,
) -> None:
    """Write generated images with their latents, to draw labels on instead of on real ones."""
    from handsoff_stream.fitting import write_samples

    manifest = write_samples(
        generator,
        out,
        num=num,
        candidates=candidates,
        seed=seed,
        truncation=truncation,
        device=device,
        progress=True,
    )
    console.print(
        f"draw masks into {out}/masks/ by the names of the images, then: handsoff-stream fit {generator} "
        f"--images {manifest} ..."
    )


@app.command(epilog="Example: `handsoff-stream train faces deeplab.pt --steps 2000 --backbone resnet101`")
@plain_errors
def train(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="State dict of the trained network.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 8,
    backbone: Annotated[str, typer.Option(help="resnet101, resnet50, mobilenet_v3_large or resnet18.")] = "resnet18",
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    test_images: Annotated[Path | None, typer.Option(help="Folder of real test images.")] = None,
    test_labels: Annotated[Path | None, typer.Option(help="Folder of their masks.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Train DeepLabV3 on the stream, and score it on real images (the held-out renders for `faces`)."""
    from handsoff_stream.demo import train_on_stream

    train_on_stream(
        checkpoint,
        out,
        steps=steps,
        batch_size=batch_size,
        backbone=backbone,
        lr=lr,
        test_folders=None if test_images is None or test_labels is None else (test_images, test_labels),
        seed=seed,
        device=device,
        console=console,
    )


@app.command(epilog="Example: `handsoff-stream export faces shards/ --num 10000`")
@plain_errors
def export(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Folder for shard-000000.tar, ...; an unfinished export continues.")],
    num: Annotated[int, typer.Option(help="Accepted samples in all.")] = 10_000,
    shard_size: Annotated[int, typer.Option(help="Samples a shard.")] = 1000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Write samples as WebDataset shards, lossless and resumable."""
    from handsoff_stream.outlets.webdataset import write_shards
    from handsoff_stream.progress import progress_bar
    from handsoff_stream.stream import HandsOffStream

    stream = HandsOffStream(checkpoint, batch_size=1, seed=seed, device=device)
    with progress_bar("exporting", num, console=console) as update:
        paths = write_shards(stream, out, num_samples=num, shard_size=shard_size, progress=lambda n: update(n, ""))
    console.print(f"wrote {len(paths)} shards to {out}")


@app.command(epilog="Example: `handsoff-stream demo --out demo --steps 2000 --backbone resnet101`")
@plain_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for preview.png and result.json.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of each training.")] = None,
    backbone: Annotated[str | None, typer.Option(help="resnet101, resnet50, mobilenet_v3_large or resnet18.")] = None,
    test_images: Annotated[int, typer.Option(help="Held-out renders to score on.")] = 200,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Train one network on the stream and one on the 16 labelled images, with equal budgets; compare them."""
    from handsoff_stream.demo import run_demo

    run_demo(out, steps=steps, backbone=backbone, test_images=test_images, seed=seed, device=device, console=console)


def main() -> None:
    """Entry point of the `handsoff-stream` command."""
    app()


if __name__ == "__main__":
    main()
