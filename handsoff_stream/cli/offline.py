"""Commands that make a checkpoint: convert, import-labels, train-encoder, invert, sample, fit.

The offline part is imported inside functions: importing it takes seconds, and `--help` should be fast.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from handsoff_stream.cli.app import (
    REPEAT,
    DeviceOption,
    SeedOption,
    app,
    arguments_of,
    cell,
    console,
    plain_errors,
    tell,
)
from handsoff_stream.cli.fit_arguments import (
    CalibrationOption,
    DomainOption,
    EncoderOption,
    FitArguments,
    GeneratorArgument,
    HalfOption,
    NetOption,
    RadiusOption,
    ResizeOption,
    StepsOption,
)
from handsoff_stream.cli.parsing import parse_inversion, parse_names

AverageLatentOption = Annotated[
    Path | None, typer.Option(help=".npy file of the average latent, if the generator file has none.")
]


@app.command(epilog="Example: `handsoff-stream convert stylegan2-ffhq-config-f.pt ffhq.safetensors`")
@plain_errors()
def convert(
    generator: Annotated[Path, typer.Argument(help="Published generator file: .pt, .pth or .pkl.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors.")],
    average_latent: AverageLatentOption = None,
    half: HalfOption = False,
) -> None:
    """Convert a published generator file into a checkpoint, which contains no code."""
    from handsoff_stream.checkpoint import import_generator, save_checkpoint
    from handsoff_stream.files.atomic import check_file

    check_file(out, inputs=[generator] if average_latent is None else [generator, average_latent])
    save_checkpoint(out, import_generator(generator, average_latent=average_latent), half=half)
    tell(f"wrote {out}")


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """The arguments of `import-labels`; the help texts say what each field means."""

    generator: Annotated[Path, typer.Argument(help="Published generator file that the experiment used.")]
    experiment: Annotated[Path, typer.Argument(help="The experiment's JSON.")]
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, .safetensors.")]
    members: Annotated[
        Path | None, typer.Option(help="Folder of model_0.pth, ...; default: the one that the JSON names.")
    ] = None
    classes: Annotated[str | None, typer.Option(help="Class names in the order of their ids, separated by commas.")] = (
        None
    )
    average_latent: AverageLatentOption = None
    half: HalfOption = False
    calibration_samples: CalibrationOption = 2000
    device: DeviceOption = None


@app.command(epilog="Example: `handsoff-stream import-labels ffhq.pt exp.json faces.safetensors`")
@arguments_of(ImportArguments)
@plain_errors()
def import_labels(given: ImportArguments) -> None:
    """Make a checkpoint from a label generator that was trained with HandsOff's or DatasetGAN's code."""
    from handsoff_stream.fitting.from_files import PublishedFiles, import_label_generator

    files = PublishedFiles(
        generator=given.generator,
        experiment=given.experiment,
        members=given.members,
        average_latent=given.average_latent,
    )
    import_label_generator(
        files,
        given.out,
        class_names=parse_names(given.classes),
        half=given.half,
        calibration_samples=given.calibration_samples,
        device=given.device,
    )
    tell(f"wrote {given.out}")


@app.command(name="train-encoder", epilog="Example: `handsoff-stream train-encoder faces photos/ encoder.safetensors`")
@plain_errors(REPEAT)
def train_encoder_verb(
    generator: GeneratorArgument,
    images: Annotated[Path, typer.Argument(help="Folder of images; they need no labels.")],
    out: Annotated[Path, typer.Argument(help="Encoder to write, .safetensors; an unfinished training continues.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    architecture: Annotated[str, typer.Option(help="small, or ReStyle's resnet34 or ir_se50.")] = "small",
    resize: ResizeOption = "exact",
    net: NetOption = None,
    device: DeviceOption = None,
) -> None:
    """Train a ReStyle encoder, which predicts the latents that inversion starts from, for a domain without one."""
    from handsoff_stream.fitting import EncoderSettings
    from handsoff_stream.fitting.from_files import train_encoder_on_folder

    settings = EncoderSettings(steps=steps, architecture=architecture)
    train_encoder_on_folder(generator, images, out, settings, resize=resize, net=net, device=device)
    tell(f"wrote {out}")


@dataclass(frozen=True, kw_only=True)
class InvertArguments:
    """The arguments of `invert`; the help texts say what each field means."""

    generator: GeneratorArgument
    images: Annotated[Path, typer.Argument(help="Folder of images.")]
    out: Annotated[Path, typer.Argument(help="Folder for one .safetensors file per image; finished ones are kept.")]
    domain: DomainOption = None
    steps: StepsOption = None
    encoder: EncoderOption = None
    radius: RadiusOption = 0.5
    resize: ResizeOption = "exact"
    net: NetOption = None
    device: DeviceOption = None


@app.command(name="invert", epilog="Example: `handsoff-stream invert faces photos/ latents/ --steps 500`")
@arguments_of(InvertArguments)
@plain_errors(REPEAT)
def invert_verb(given: InvertArguments) -> None:
    """Find the latents of real images; repeat the command to continue an interrupted run."""
    from handsoff_stream.fitting.from_files import InversionOptions, invert_folder

    settings = parse_inversion(given.domain, given.steps, given.radius)
    options = InversionOptions(settings=settings, encoder=given.encoder, net=given.net)
    found = invert_folder(given.generator, given.images, given.out, options, resize=given.resize, device=given.device)
    table = Table("image", "LPIPS", "PSNR (dB)")
    for name, lpips, psnr in found:
        table.add_row(cell(name), f"{lpips:.3f}", f"{psnr:.1f}")
    console.print(table)


@app.command(epilog="Example: `handsoff-stream sample ffhq.pt to_annotate/ --num 16`")
@plain_errors(REPEAT)
def sample(
    generator: GeneratorArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write; an unfinished run is continued.")],
    num: Annotated[int, typer.Option(min=1, max=100_000, help="Images to annotate.")] = 12,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Select the most informative images among so many (DatasetGAN); needs a checkpoint with a head.",
        ),
    ] = None,
    seed: SeedOption = 0,
    truncation: Annotated[float | None, typer.Option(help="psi; default: the checkpoint's.")] = None,
    device: DeviceOption = None,
) -> None:
    """Write generated images with their latents, to be annotated instead of real images."""
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
    tell(
        f"draw masks into {out}/masks/ by the names of the images, then: handsoff-stream fit {generator} "
        f"--images {manifest} ..."
    )


@app.command(
    name="fit",
    epilog="Example: `handsoff-stream fit ffhq.pt --images photos/ --labels masks/ "
    "--class-map celebamask_hq_8 --label-size 512 --out mine.safetensors`",
)
@arguments_of(FitArguments)
@plain_errors(REPEAT)
def fit_verb(given: FitArguments) -> None:
    """Fit a label generator to a few labelled images, and write a checkpoint to stream from."""
    from handsoff_stream.fitting.from_files import fit_files

    files = given.files()
    summary = fit_files(given.generator, files, given.out, given.fit_options(files.class_map))
    note = ""
    if summary.accuracy is not None:
        note = f"; accuracy on held-out pixels of the labelled images {summary.accuracy:.1%}"
    tell(f"wrote {given.out}{note}")
    if summary.unseen_classes:
        tell(f"no labelled image shows {', '.join(summary.unseen_classes)}, so the stream will not label them either")
