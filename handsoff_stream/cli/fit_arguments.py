"""Options of the offline commands with their help texts, and the options of `fit` and `check` as one object each.

The offline part is imported inside functions: importing it takes seconds, and `--help` should be fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from handsoff_stream.cli.app import DeviceOption, SeedOption
from handsoff_stream.cli.parsing import (
    parse_augmentation,
    parse_class_map,
    parse_crop_box,
    parse_inversion,
    parse_teacher,
)

if TYPE_CHECKING:
    from handsoff_stream.checking import CheckOptions
    from handsoff_stream.datasets.labelled_images import ClassMap
    from handsoff_stream.fitting import FitSettings
    from handsoff_stream.fitting.from_files import FitOptions, InversionOptions
    from handsoff_stream.fitting.labelled_files import LabelledFiles

GeneratorArgument = Annotated[
    str, typer.Argument(help="Generator or checkpoint file, or the name of an included checkpoint.")
]
NetOption = Annotated[
    str | None,
    typer.Option(help="Features to compare images in: efficientnet-lite0 (ImageNet), or LPIPS's vgg, alex or squeeze."),
]
EncoderOption = Annotated[Path | None, typer.Option(help="Encoder whose latents inversion starts from and stays near.")]
DomainOption = Annotated[
    str | None,
    typer.Option(help="Use the paper's settings for: faces, cars, full-bodies-8, full-bodies-10 or streets."),
]
StepsOption = Annotated[
    int | None, typer.Option(min=0, help="Gradient steps per image; default: the domain's, or 500.")
]
RadiusOption = Annotated[float, typer.Option(help="With an encoder: c_reg, the bound on |w - w_e|^2; inf: no bound.")]
DEFAULT_RADIUS = 0.5
ResizeOption = Annotated[
    str, typer.Option(help="How images of another size are fitted: exact (refuse them), crop or pad.")
]
HalfOption = Annotated[bool, typer.Option(help="Store weights as float16.")]
CalibrationOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=1_000_000,
        help="Samples whose scores fill the rolling filter's window at the start; 0: the window starts empty.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class LabelledArguments:
    """What `fit` and `check` share: a generator, labelled images, their inversion; see the help texts."""

    generator: GeneratorArgument
    images: Annotated[Path, typer.Option(help="Folder of at most about 50 labelled images, or a .csv/.json manifest.")]
    labels: Annotated[Path | None, typer.Option(help="Folder of masks (PNG or .npy), matched by name.")] = None
    class_map: Annotated[
        str | None,
        typer.Option(help="Meaning of ids or colors in masks: name of an included class map, or a YAML file."),
    ] = None
    classes: Annotated[
        str | None, typer.Option(help="Instead, for masks of class ids: class names in order, separated by commas.")
    ] = None
    resize: ResizeOption = "exact"
    crop_box: Annotated[
        str | None, typer.Option(help="TOP,LEFT,BOTTOM,RIGHT in pixels; images are cropped to it first.")
    ] = None
    label_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Height of the labels in pixels; default: that of the generator's images."),
    ] = None
    smallest_region: Annotated[
        int, typer.Option(min=0, help="Connected components with fewer pixels become unlabelled; HandsOff uses 30.")
    ] = 0
    domain: DomainOption = None
    latents: Annotated[
        Path | None, typer.Option(help="Folder of inversions; default: OUT.latents/ (fit), OUT/latents/ (check).")
    ] = None
    given_latents: Annotated[
        Path | None, typer.Option(help="Published .npy of latents to use instead of inversion.")
    ] = None
    latent_space: Annotated[str, typer.Option(help="Space of the given latents: w+, w or z.")] = "w+"
    latent_truncation: Annotated[
        float, typer.Option(help="Truncation psi that the images of given z or w were generated with.")
    ] = 1.0
    latent_cutoff: Annotated[
        int | None, typer.Option(min=0, help="Number of style inputs that were truncated; default: all.")
    ] = None
    steps: StepsOption = None
    encoder: EncoderOption = None
    radius: RadiusOption = DEFAULT_RADIUS
    net: NetOption = None
    hidden: Annotated[
        tuple[int, int] | None, typer.Option(help="Widths of the two hidden layers; default: the domain's.")
    ] = None
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of fitting.")] = None
    device: DeviceOption = None

    def files(self) -> LabelledFiles:
        """The labelled images, and how they are read.

        Raises:
            ValueError: a wrong class map, crop box or latent space, or options that do not go together.
        """
        if self.latents is not None and self.given_latents is not None:
            raise ValueError(
                "--latents is the folder of inversions, but --given-latents replaces inversion; pass one of them"
            )
        if self.encoder is None and self.radius != DEFAULT_RADIUS:
            raise ValueError(
                f"--radius {self.radius} bounds the distance from an encoder's latents; pass --encoder too"
            )
        from handsoff_stream.fitting import LatentSpace
        from handsoff_stream.fitting.labelled_files import LabelledFiles

        return LabelledFiles(
            images=self.images,
            labels=self.labels,
            class_map=parse_class_map(self.class_map, self.classes),
            resize=self.resize,
            label_height=self.label_size,
            crop_box=parse_crop_box(self.crop_box),
            smallest_region=self.smallest_region,
            given_latents=self.given_latents,
            latent_space=LatentSpace(
                name=self.latent_space, truncation=self.latent_truncation, cutoff=self.latent_cutoff
            ),
        )

    def inversion_options(self) -> InversionOptions:
        """How images get their latents.

        Raises:
            ValueError: a setting out of its range.
        """
        from handsoff_stream.fitting.from_files import InversionOptions

        inversion = parse_inversion(self.domain, self.steps, self.radius)
        return InversionOptions(settings=inversion, encoder=self.encoder, net=self.net)

    def fit_settings(self) -> FitSettings:
        """The default settings, overridden by the given options."""
        from handsoff_stream.fitting import FitSettings

        settings = FitSettings()
        hidden = settings.hidden if self.hidden is None else self.hidden
        epochs = settings.epochs if self.epochs is None else self.epochs
        return replace(settings, hidden=hidden, epochs=epochs)


@dataclass(frozen=True, kw_only=True)
class FitArguments(LabelledArguments):
    """The arguments of `fit`; the help texts say what each field means."""

    out: Annotated[Path, typer.Option(help="Checkpoint to write.")]
    augmentations: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Augmented copies per image, more for images with rare classes; they are inverted and fitted too.",
        ),
    ] = 0
    flip: Annotated[bool, typer.Option("--flip", help="Mirror every other augmentation.")] = False
    any_color: Annotated[
        str | None, typer.Option(help="Classes that augmentations recolor freely, separated by commas, such as hat.")
    ] = None
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher", help="Also learn from samples, labelled by networks that are trained on the labelled images."
        ),
    ] = False
    teacher_network: Annotated[
        Path | None, typer.Option(help="Label the samples by this network instead, which `train` has written.")
    ] = None
    teacher_samples: Annotated[int | None, typer.Option(min=1, max=100_000, help="Samples to label; default: 64.")] = (
        None
    )
    teacher_confidence: Annotated[
        float | None, typer.Option(help="Pixels of samples with a smaller probability stay unlabelled; default: 0.9.")
    ] = None
    teacher_members: Annotated[int | None, typer.Option(min=1, max=100, help="Networks to train; default: 3.")] = None
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Steps of each of them; default: 300.")] = None
    invertibility: Annotated[
        float,
        typer.Option(
            help="Leave out pixels whose inversion differs from the image by more than this many medians, such as 2; "
            "inf: none."
        ),
    ] = math.inf
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without improvement.")] = None
    memory_gb: Annotated[
        float | None, typer.Option(help="Memory for features on the device, in GB; the rest is kept on disk.")
    ] = None
    half: HalfOption = False
    calibration_samples: CalibrationOption = 2000

    def fit_options(self, class_map: ClassMap) -> FitOptions:
        """All options that do not concern how the labelled images are read.

        Raises:
            ValueError: a setting out of its range.
        """
        from handsoff_stream.fitting.from_files import FitOptions

        augmentation = parse_augmentation(
            class_map, per_image=self.augmentations, flip=self.flip, any_color=self.any_color
        )
        return FitOptions(
            inversion=self.inversion_options(),
            latents_folder=self.latents,
            fit=replace(self.fit_settings(), patience=self.patience),
            widths_of=self.domain if self.hidden is None else None,
            augmentation=augmentation,
            teacher=parse_teacher(
                self.teacher,
                self.teacher_network,
                samples=self.teacher_samples,
                confidence=self.teacher_confidence,
                members=self.teacher_members,
                steps=self.teacher_steps,
            ),
            invertibility=None if self.invertibility == math.inf else self.invertibility,
            memory_gb=self.memory_gb,
            half=self.half,
            calibration_samples=self.calibration_samples,
            device=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class CheckArguments(LabelledArguments):
    """The arguments of `check`; the help texts say what each field means."""

    out: Annotated[Path, typer.Option(help="Folder of the report; an unfinished check is continued.")]
    folds: Annotated[int, typer.Option(help="Parts of the images; each is held out once.")] = 4
    members: Annotated[int, typer.Option(min=1, help="Members of each label generator; fit has 10.")] = 3
    network_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the segmentation network for comparison; 0: leave it out.")
    ] = 300
    seed: SeedOption = 0

    def check_options(self) -> CheckOptions:
        """All options that do not concern how the labelled images are read.

        Raises:
            ValueError: a setting out of its range.
        """
        from handsoff_stream.checking import CheckOptions
        from handsoff_stream.fitting import TeacherSettings

        return CheckOptions(
            inversion=self.inversion_options(),
            latents_folder=self.latents,
            fit=replace(self.fit_settings(), members=self.members, seed=self.seed),
            widths_of=self.domain if self.hidden is None else None,
            network=TeacherSettings(members=1, steps=self.network_steps) if self.network_steps else None,
            folds=self.folds,
            seed=self.seed,
            device=self.device,
        )
