"""Commands that use a checkpoint: inspect, preview, train, export, demo.

Functions are imported where they are called: importing them takes seconds, and `--help` should be fast. The docstrings
of commands are their help texts, and so have no sections.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from handsoff_stream.cli.app import (
    REPEAT,
    CheckpointArgument,
    DeviceOption,
    PrecisionOption,
    SeedOption,
    app,
    cell,
    console,
    plain_errors,
    tell,
)

BACKBONES_HELP = "efficientnet-lite0 (for about 128 pixels), resnet101, resnet50, mobilenet_v3_large or resnet18."


@app.command(epilog="Example: `handsoff-stream inspect faces`")
@plain_errors("nothing was changed; repeat the command to begin again")
def inspect(
    checkpoint: CheckpointArgument,
    scan: Annotated[
        bool,
        typer.Option(
            "--scan",
            help="List every global that the pickles in a file or folder would import, without loading them. Exit "
            "code 0: all are known; 1: at least one is unknown; 2: something could not be read.",
        ),
    ] = False,
) -> None:
    """Describe a checkpoint or a generator file."""
    if scan:
        _scan(checkpoint)
        return
    from handsoff_stream.inspect import describe

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in describe(checkpoint).items():
        table.add_row(cell(name), cell(value))
    console.print(table)


def _scan(path: str) -> None:
    from handsoff_stream.files.scan import scan

    counts = {"clean": 0, "suspicious": 0, "error": 0}
    for found in scan(path):
        counts[found.verdict] += 1
        tell(found.sentence())
    tell(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["suspicious"] or counts["error"]:
        raise typer.Exit(1 if counts["suspicious"] else 2)


@app.command(epilog="Example: `handsoff-stream preview faces sheet.png --num 24 --seed 7`")
@plain_errors()
def preview(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    num: Annotated[int, typer.Option(min=1, max=1024, help="Samples on the sheet.")] = 16,
    seed: SeedOption = 0,
    truncation: Annotated[float | None, typer.Option(help="psi; default: the checkpoint's.")] = None,
    device: DeviceOption = None,
) -> None:
    """Draw a sheet of images, label overlays and uncertainty maps, with rejected samples marked."""
    from handsoff_stream.preview import preview_sheet

    preview_sheet(checkpoint, out, num=num, seed=seed, truncation=truncation, device=device)
    tell(f"wrote {out}")


@app.command(epilog="Example: `handsoff-stream train faces deeplab.pt --steps 2000 --backbone resnet101`")
@plain_errors("an unfinished training is not kept; repeat the command to begin again")
def train(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="State dict of the trained network.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=2, max=4096, help="Samples per step.")] = 8,
    backbone: Annotated[
        str, typer.Option(help="efficientnet-lite0, resnet101, resnet50, mobilenet_v3_large or resnet18.")
    ] = "resnet18",
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    test_images: Annotated[Path | None, typer.Option(help="Folder of real test images.")] = None,
    test_labels: Annotated[Path | None, typer.Option(help="Folder of their masks.")] = None,
    seed: SeedOption = 0,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
) -> None:
    """Train DeepLabV3 on the stream, and score it on real images (for `faces`, on held-out renders)."""
    from handsoff_stream.downstream.on_stream import train_on_stream

    if (test_images is None) != (test_labels is None):
        raise ValueError(
            "test images and their masks are only of use together; pass both --test-images and --test-labels"
        )
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
        precision=precision,
        console=console,
    )


@app.command(epilog="Example: `handsoff-stream export faces shards/ --num 10000`")
@plain_errors(REPEAT)
def export(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Folder for shard-000000.tar, ...; an unfinished export is continued.")],
    num: Annotated[int, typer.Option(min=1, help="Total number of accepted samples.")] = 10_000,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 1000,
    seed: SeedOption = 0,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
) -> None:
    """Write samples as WebDataset shards without loss; an interrupted export can be continued."""
    from handsoff_stream.device import usable_device
    from handsoff_stream.outlets.webdataset import write_shards
    from handsoff_stream.progress import progress_bar
    from handsoff_stream.stream import HandsOffStream

    stream = HandsOffStream(checkpoint, batch_size=1, seed=seed, device=usable_device(device), precision=precision)
    with progress_bar("exporting", num, console=console) as update:
        paths = write_shards(stream, out, num_samples=num, shard_size=shard_size, progress=lambda n: update(n, ""))
    tell(f"wrote {len(paths)} shards to {out}")


@app.command(epilog="Example: `handsoff-stream demo --out demo --steps 2000 --backbone resnet101`")
@plain_errors("there is no result; repeat the command to begin again")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for preview.png and result.json.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each training.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="efficientnet-lite0, resnet101, resnet50, mobilenet_v3_large or resnet18.")
    ] = None,
    test_images: Annotated[int, typer.Option(min=1, max=100_000, help="Held-out renders to score on.")] = 200,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Compare networks trained on 16 labelled images, and on these mixed with the stream, with equal budgets."""
    from handsoff_stream.demo import run_demo

    run_demo(out, steps=steps, backbone=backbone, test_images=test_images, seed=seed, device=device, console=console)
