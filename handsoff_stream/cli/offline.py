"""Verbs that make a checkpoint: convert, import-labels, train-encoder, invert, sample, fit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from handsoff_stream.cli.app import DeviceOption, SeedOption, app, console, plain_errors

GeneratorArgument = Annotated[str, typer.Argument(help="Generator or checkpoint file, or a name that ships.")]
NetOption = Annotated[str | None, typer.Option(help="LPIPS backbone: vgg, alex or squeeze.")]
EncoderOption = Annotated[Path | None, typer.Option(help="ReStyle encoder to start from and stay near.")]
DomainOption = Annotated[
    str | None, typer.Option(help="Settings of the paper: faces, cars, full-bodies-8, full-bodies-10 or streets.")
]
StepsOption = Annotated[int | None, typer.Option(help="Gradient steps an image; default: the domain's, or 500.")]
RadiusOption = Annotated[
    float, typer.Option(help="With an encoder: c_reg, how far |w - w_e|^2 may grow; inf: anywhere.")
]
FitOption = Annotated[str, typer.Option(help="Images of another size: exact (refuse), crop or pad.")]

CalibrationOption = Annotated[
    int,
    typer.Option(min=0, help="Samples whose scores a rolling filter starts from; 0: it starts with the stream's own."),
]


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


@app.command(name="import-labels", epilog="Example: `handsoff-stream import-labels ffhq.pt exp.json faces.safetensors`")
@plain_errors
def import_labels(
    generator: Annotated[Path, typer.Argument(help="Published generator file that the experiment used.")],
    experiment: Annotated[Path, typer.Argument(help="The experiment's JSON.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors.")],
    members: Annotated[Path | None, typer.Option(help="Folder of model_0.pth, ...; default: the JSON's.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in order of their ids, with commas.")] = None,
    average_latent: Annotated[Path | None, typer.Option(help=".npy file, where the generator stores none.")] = None,
    half: Annotated[bool, typer.Option(help="Store weights as float16.")] = False,
    calibration_samples: CalibrationOption = 2000,
    device: DeviceOption = None,
) -> None:
    """Make a checkpoint of a label generator that HandsOff's or DatasetGAN's code trained."""
    from handsoff_stream.fitting.from_files import import_label_generator

    names = None if classes is None else [name.strip() for name in classes.split(",")]
    import_label_generator(
        generator, experiment, out, members=members, class_names=names, average_latent=average_latent, half=half,
        device=device, calibration_samples=calibration_samples,
    )  # fmt: skip
    console.print(f"wrote {out}")


@app.command(name="train-encoder", epilog="Example: `handsoff-stream train-encoder faces photos/ encoder.safetensors`")
@plain_errors
def train_encoder(
    generator: GeneratorArgument,
    images: Annotated[Path, typer.Argument(help="Folder of images; they need no labels.")],
    out: Annotated[Path, typer.Argument(help="Encoder to write, .safetensors; an unfinished training continues.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2000,
    architecture: Annotated[str, typer.Option(help="small, or ReStyle's resnet34 and ir_se50.")] = "small",
    fit: FitOption = "exact",
    net: NetOption = None,
    device: DeviceOption = None,
) -> None:
    """Train a ReStyle encoder for a domain that has none: it guesses the latents that inversion starts from."""
    from handsoff_stream.fitting.from_files import train_encoder_on_folder

    train_encoder_on_folder(
        generator, images, out, steps=steps, architecture=architecture, fit=fit, net=net, device=device
    )
    console.print(f"wrote {out}")


@app.command(epilog="Example: `handsoff-stream invert faces photos/ latents/ --steps 500`")
@plain_errors
def invert(
    generator: GeneratorArgument,
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    out: Annotated[Path, typer.Argument(help="Folder for one .safetensors file an image; finished ones are kept.")],
    domain: DomainOption = None,
    steps: StepsOption = None,
    encoder: EncoderOption = None,
    radius: RadiusOption = 0.5,
    fit: FitOption = "exact",
    net: NetOption = None,
    device: DeviceOption = None,
) -> None:
    """Find the latents of real images; run again to continue an interrupted run."""
    from handsoff_stream.fitting.from_files import inversion_settings, invert_folder

    settings = inversion_settings(domain, steps, radius)
    found = invert_folder(generator, images, out, settings, encoder=encoder, fit=fit, net=net, device=device)
    table = Table("image", "LPIPS", "PSNR (dB)")
    for name, lpips, psnr in found:
        table.add_row(name, f"{lpips:.3f}", f"{psnr:.1f}")
    console.print(table)


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


@app.command(
    epilog="Example: `handsoff-stream fit ffhq.pt --images photos/ --labels masks/ "
    "--class-map celebamask_hq_8 --label-size 512 --out mine.safetensors`"
)
@plain_errors
def fit(
    generator: GeneratorArgument,
    images: Annotated[Path, typer.Option(help="Folder of at most about 50 labelled images, or a .csv/.json manifest.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    labels: Annotated[Path | None, typer.Option(help="Folder of masks (PNG or .npy), matched by name.")] = None,
    class_map: Annotated[str | None, typer.Option(help="What ids or colours mean: a map that ships, or YAML.")] = None,
    classes: Annotated[str | None, typer.Option(help="Or, for plain ids: names in their order, with commas.")] = None,
    fit: FitOption = "exact",
    crop_box: Annotated[str | None, typer.Option(help="TOP,LEFT,BOTTOM,RIGHT in pixels, cut out first.")] = None,
    label_size: Annotated[int | None, typer.Option(help="Height of the labels; default: the generator's.")] = None,
    smallest_region: Annotated[int, typer.Option(help="Smaller specks in masks become unlabelled; HandsOff: 30.")] = 0,
    views: Annotated[
        int, typer.Option(help="Views of each image, inverted and learnt from too; more where classes are rare.")
    ] = 0,
    flip_views: Annotated[bool, typer.Option("--flip-views", help="Mirror every other one.")] = False,
    any_color: Annotated[
        str | None, typer.Option(help="Classes whose hue views turn freely, with commas, such as hat.")
    ] = None,
    domain: DomainOption = None,
    latents: Annotated[Path | None, typer.Option(help="Folder of inversions; default: OUT.latents/.")] = None,
    given_latents: Annotated[Path | None, typer.Option(help="Published .npy of latents, instead of inversion.")] = None,
    latent_space: Annotated[str, typer.Option(help="Of latents that are given: w+, w or z.")] = "w+",
    latent_truncation: Annotated[float, typer.Option(help="psi that the images of given z or w were made with.")] = 1.0,
    latent_cutoff: Annotated[int | None, typer.Option(help="On how many style inputs; default: all.")] = None,
    steps: StepsOption = None,
    encoder: EncoderOption = None,
    radius: RadiusOption = 0.5,
    net: NetOption = None,
    hidden: Annotated[tuple[int, int] | None, typer.Option(help="Widths of the layers; default: the domain's.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of fitting.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without progress.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="For features on the device; the rest goes to disk.")] = None,
    half: Annotated[bool, typer.Option(help="Store weights as float16.")] = False,
    calibration_samples: CalibrationOption = 2000,
    device: DeviceOption = None,
) -> None:
    """Learn to label what a generator makes, from a few labelled images; writes a checkpoint to stream from."""
    from handsoff_stream.fitting import LatentSpace
    from handsoff_stream.fitting.from_files import (
        LabelledFiles,
        fit_files,
        fit_settings,
        inversion_settings,
        open_class_map,
        view_settings,
    )

    files = LabelledFiles(
        images=images,
        labels=labels,
        class_map=open_class_map(class_map, classes),
        fit=fit,
        label_height=label_size,
        crop_box=crop_box,
        smallest_region=smallest_region,
        given_latents=given_latents,
        latent_space=LatentSpace(name=latent_space, truncation=latent_truncation, cutoff=latent_cutoff),
    )
    accuracy, unseen = fit_files(
        generator,
        files,
        out,
        latents=latents,
        inversion=inversion_settings(domain, steps, radius),
        encoder=encoder,
        settings=fit_settings(hidden=hidden, epochs=epochs, patience=patience),
        views=view_settings(files.class_map, views=views, flip=flip_views, any_color=any_color),
        widths_of=domain if hidden is None else None,
        net=net,
        memory_gb=memory_gb,
        half=half,
        device=device,
        calibration_samples=calibration_samples,
    )
    note = "" if accuracy is None else f"; accuracy on held-out pixels of the labelled images {accuracy:.1%}"
    console.print(f"wrote {out}{note}")
    if unseen:
        console.print(f"no labelled image shows {', '.join(unseen)}, so the stream never will")
