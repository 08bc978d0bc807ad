"""The schema of a checkpoint's manifest: names, types and bounds of its entries.

Knows names, types and bounds. Does not know whether the values suit each other; the constructors of generators, tasks
and label generators check that.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from handsoff_stream.files.budget import MAX_HEADS, MAX_LEVELS, MAX_MEMBERS, MAX_NAMES, MAX_SCORES, MAX_SIDE
from handsoff_stream.files.schema import Count, Name, Number, Schema

FORMAT_VERSION = 1

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Coordinate = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Width = Annotated[Count, Field(ge=1)]
Level = Annotated[Number, Field(ge=0)]


def _of_a_file(name: str) -> str:
    if not all(c.isalnum() or c in " _-" for c in name):
        raise ValueError("must consist of letters, digits, spaces, underscores and hyphens")
    return name


HeadName = Annotated[Name, AfterValidator(_of_a_file)]  # part of the names of tensors and of exported files


class GeneratorPart(Schema):
    """The generator's family and the arguments of its constructor."""

    family: Name
    config: dict[Name, Any]


class LabelGeneratorPart(Schema):
    """The arguments of `LabelGenerator`."""

    feature_channels: Annotated[list[Width], Field(min_length=1, max_length=2 * MAX_LEVELS)]
    hidden: Annotated[list[Width], Field(min_length=2, max_length=2)]
    num_outputs: Width
    members: Annotated[int, Field(ge=1, le=MAX_MEMBERS)]


class HeadPart(Schema):
    """A task, as `Task.config()` describes it, and its label generator."""

    task: dict[Name, Any]
    label_generator: LabelGeneratorPart


class CropPart(Schema):
    """The output's part of the generator's image, in pixels; bottom and right are exclusive."""

    top: Coordinate
    bottom: Coordinate
    left: Coordinate
    right: Coordinate


class CalibrationPart(Schema):
    """The scores of calibration samples by kind, the options that they were made with, and the mean uncertainty of each
    class by head."""

    options: dict[Name, Number | Name]
    scores: dict[Name, Annotated[list[Number], Field(max_length=MAX_SCORES)]]
    class_uncertainty: dict[HeadName, Annotated[list[Level | None], Field(max_length=MAX_NAMES)]] = {}


class Manifest(Schema):
    """Everything that a checkpoint stores except its tensors."""

    format_version: Count
    generator: GeneratorPart
    heads: Annotated[dict[HeadName, HeadPart], Field(max_length=MAX_HEADS)]
    output_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    truncation: Annotated[Number, Field(ge=0, le=2)]
    crop: CropPart | None = None
    calibration: CalibrationPart | None
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    provenance: dict[str, Any]
