"""Strings and numbers of the command line => arguments of the functions that the commands call.

Knows how users write options, and which options go together. Does not know how they are used. The offline part is
imported inside functions: importing it takes seconds, and `--help` should be fast.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from handsoff_stream.geometry import Rectangle

if TYPE_CHECKING:
    from handsoff_stream.datasets.labelled_images import ClassMap
    from handsoff_stream.fitting import AugmentationSettings, InversionSettings
    from handsoff_stream.fitting.teacher import Teacher


def parse_names(text: str | None) -> tuple[str, ...]:
    """Names separated by commas; None gives no names."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def parse_crop_box(text: str | None) -> Rectangle | None:
    """A rectangle from "TOP,LEFT,BOTTOM,RIGHT" in pixels; None gives None.

    Raises:
        ValueError: anything but four whole numbers.
    """
    if text is None:
        return None
    try:
        top, left, bottom, right = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"crop box {text!r} is not TOP,LEFT,BOTTOM,RIGHT; pass four whole numbers of pixels") from None
    return Rectangle(top, left, bottom, right)


def parse_class_map(name_or_path: str | None, class_names: str | None) -> ClassMap:
    """The class map of a name or YAML file, or, for masks that hold class ids, of names separated by commas.

    Raises:
        ValueError: both or neither are given, or the class map is wrong.
    """
    from handsoff_stream.config import load_class_map
    from handsoff_stream.datasets.labelled_images import ClassMap

    if name_or_path is not None and class_names is None:
        return load_class_map(name_or_path)
    if name_or_path is None and class_names is not None:
        return ClassMap.of_ids(parse_names(class_names))
    given = "both --class-map and --classes" if class_names is not None else "neither --class-map nor --classes"
    raise ValueError(
        f"{given}, but the meaning of masks is given once; pass --class-map NAME|FILE, or --classes a,b,c for plain ids"
    )


def parse_inversion(domain: str | None, steps: int | None, radius: float) -> InversionSettings:
    """The paper's settings for a domain, or the default settings without one.

    `steps` overrides the number of steps; an infinite radius means no bound.

    Raises:
        ValueError: an unknown domain, or a setting out of its range.
    """
    from handsoff_stream.fitting import InversionSettings

    if domain is None:
        settings = InversionSettings()
    else:
        # Full bodies were published with 8 and with 10 classes; their inversion is the same.
        settings = InversionSettings.for_domain(domain.removesuffix("-8").removesuffix("-10"))
    bound = None if radius == math.inf else radius
    return replace(settings, steps=settings.steps if steps is None else steps, radius=bound)


def parse_augmentation(
    class_map: ClassMap, *, per_image: int, flip: bool, any_color: str | None
) -> AugmentationSettings | None:
    """Settings of the augmentation, or None for no augmentations.

    Args:
        class_map: of the labelled images.
        per_image: augmentations per image.
        flip: mirror every other augmentation.
        any_color: names of classes that are recolored freely, separated by commas.

    Raises:
        ValueError: a name that the class map lacks, or settings of augmentations without augmentations.
    """
    from handsoff_stream.fitting import AugmentationSettings

    names = parse_names(any_color)
    unknown = [name for name in names if name not in class_map.class_names]
    if unknown:
        raise ValueError(f"no class is named {unknown[0]!r}; pass some of {', '.join(class_map.class_names)}")
    if per_image == 0 and (flip or names):
        raise ValueError(
            "there are no augmentations to flip or recolor; pass --augmentations N, or leave out --flip and --any-color"
        )
    ids = tuple(class_map.class_names.index(name) for name in names)
    return AugmentationSettings(per_image=per_image, flip=flip, any_color=ids) if per_image else None


def parse_teacher(
    wanted: bool,
    network: Path | None,
    *,
    samples: int | None,
    confidence: float | None,
    members: int | None,
    steps: int | None,
) -> Teacher | None:
    """The teacher, with defaults for what is None; None for no teacher.

    Args:
        wanted: whether `--teacher` was given; a network is enough, too.
        network: file of a network that labels instead of a trained ensemble.
        samples: see `SampleSettings`.
        confidence: see `SampleSettings`.
        members: see `TeacherSettings`.
        steps: see `TeacherSettings`.

    Raises:
        ValueError: a setting out of its range, settings without a teacher, or settings of a training with a network.
    """
    of_samples = {"samples": samples, "confidence": confidence}
    of_training = {"members": members, "steps": steps}
    if not wanted and network is None:
        given = [name for name, value in (of_samples | of_training).items() if value is not None]
        if given:
            raise ValueError(
                f"--teacher-{given[0]} belongs to a teacher; pass --teacher too, or --teacher-network FILE"
            )
        return None
    if network is not None and (members, steps) != (None, None):
        raise ValueError(
            f"--teacher-network {network} is used as it is; leave out --teacher-members and --teacher-steps"
        )
    from handsoff_stream.fitting.teacher import SampleSettings, Teacher, TeacherSettings

    chosen = {name: value for name, value in of_samples.items() if value is not None}
    training = {name: value for name, value in of_training.items() if value is not None}
    return Teacher(
        samples=replace(SampleSettings(), **chosen),  # type: ignore[arg-type]
        training=replace(TeacherSettings(), **training),  # type: ignore[arg-type]
        network=network,
    )
