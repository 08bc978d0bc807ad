"""Files that hold encoders: the published `.pt` ones of ReStyle, and our own `.safetensors`.

Told apart by content; nothing in a file is executed. The published files name the architecture in their options, and
all sizes are read off the shapes. Knows names and geometry. Does not know what encoders compute.

Shape letters: L number of style inputs, D latent size.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.budget import MAX_LEVELS, MAX_SIDE, check_count
from handsoff_stream.files.containers import read_content
from handsoff_stream.files.schema import arguments_of, validated
from handsoff_stream.files.strict_pickle import shown
from handsoff_stream.files.tensors import is_safetensors, read_tensors, write_tensors
from handsoff_stream.files.weights import build, tensor
from handsoff_stream.fitting.encoder.backbones import PUBLISHED_UNITS, EncoderConfig, StyleEncoder

# encoder_type of the published options => (backbone, feature pyramid, offsets from the first code).
ENCODER_TYPES = {
    "BackboneEncoder": ("ir_se50", False, False),
    "ResNetBackboneEncoder": ("resnet34", False, False),
    "GradualStyleEncoder": ("ir_se50", True, False),
    "ResNetGradualStyleEncoder": ("resnet34", True, False),
    "ProgressiveBackboneEncoder": ("ir_se50", False, True),
    "ResNetProgressiveBackboneEncoder": ("resnet34", False, True),
    "Encoder4Editing": ("ir_se50", True, True),
}
PREFIX = "encoder."
STEM_NAMES = {"input_layer.": "stem.", "conv1.": "stem.0.", "bn1.": "stem.1.", "relu.": "stem.2."}
UNIT_CONVOLUTION = {"ir_se50": "res_layer.1", "resnet34": "conv1"}  # from whose shape a stage's width is read
PUBLISHED_ITERATIONS = 5
PUBLISHED_HEIGHT, CROPPED_HEIGHT = 256, 192
MANIFEST_KEY = "handsoff_stream_encoder"
FORMAT_VERSION = 1


def load_restyle(path: str | Path) -> StyleEncoder:
    """Read an encoder.

    Args:
        path: one of
            - a checkpoint `.pt` of ReStyle (pSp or e4e), of any of the `ENCODER_TYPES`; `load_generator(path)` reads
              the generator in it;
            - a `.safetensors` file of `train_encoder`.

    Returns:
        The encoder on the CPU, float32, in eval mode, without gradients.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or holds no encoder of a known kind.
        ModuleNotFoundError: an encoder on EfficientNet-Lite0, but timm, which has that network, is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, so there is no encoder to load; check the path")
    own = is_safetensors(path)
    content = read_tensors(path, MANIFEST_KEY) if own else read_content(path).value
    try:
        config, state = _own(*content) if own else _published(content)
        encoder = _assemble(config, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ImportError:
        raise
    except Exception as error:  # a damaged file may hold anything where a size or a tensor is expected
        raise CheckpointError(
            f"{path}: damaged encoder ({type(error).__name__}: {printable(str(error), 100)}); copy or download it again"
        ) from error
    return encoder.eval().requires_grad_(False)


def save_encoder(path: str | Path, encoder: StyleEncoder, provenance: Mapping[str, Any]) -> None:
    """Write an encoder as `.safetensors`, whole or not at all.

    `provenance`: JSON-able; where it comes from.
    """
    manifest = {"format_version": FORMAT_VERSION, "config": encoder.config.config(), "provenance": dict(provenance)}
    write_tensors(Path(path), encoder.state_dict(), key=MANIFEST_KEY, manifest=manifest)


def _own(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[EncoderConfig, dict[str, Tensor]]:
    if type(manifest.get("format_version")) is not int or type(manifest.get("config")) is not dict:
        raise CheckpointError("a manifest without format_version and config; encoders are written by train-encoder")
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"format version {manifest['format_version']}, this release reads up to {FORMAT_VERSION}; upgrade"
        )
    given = validated(arguments_of(EncoderConfig), manifest["config"], "its geometry").model_dump(exclude_unset=True)
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return EncoderConfig(**fields), tensors


def _published(content: Any) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Content of a `.pt` file => geometry, and weights in our names."""
    whole = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(whole, Mapping) or not any(str(key).startswith(PREFIX) for key in whole):
        held = ", ".join(map(shown, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"no ReStyle encoder, but {held}; such a file has state_dict (encoder.*), opts, latent_avg"
        )
    options = content.get("opts")
    kind = options.get("encoder_type") if isinstance(options, Mapping) else None
    if not isinstance(kind, str) or kind not in ENCODER_TYPES:
        raise CheckpointError(f"opts name the encoder type {shown(kind)}; known are {', '.join(ENCODER_TYPES)}")
    state = {
        key.removeprefix(PREFIX): tensor(whole, key) for key in whole if isinstance(key, str) and key.startswith(PREFIX)
    }
    config = _geometry(state, kind, crop="cars" in str(options.get("dataset_type")), constant=_constant(whole))
    latent_avg = tensor(content, "latent_avg").float()
    rows_LD = latent_avg.reshape(-1, latent_avg.shape[-1]).expand(config.num_ws, -1)
    return config, {**{_renamed(name): t for name, t in state.items()}, "latent_avg": rows_LD}


def _geometry(state: Mapping[str, Tensor], kind: str, *, crop: bool, constant: tuple[int, int]) -> EncoderConfig:
    """All sizes, from the shapes of an encoder's weights in the published names."""
    backbone, pyramid, offsets = ENCODER_TYPES[kind]
    units = PUBLISHED_UNITS[backbone]
    stem = tensor(state, "input_layer.0.weight" if backbone == "ir_se50" else "conv1.weight", ndim=4)
    firsts = [sum(units[:stage]) for stage in range(4)]
    convolutions = [tensor(state, f"body.{i}.{UNIT_CONVOLUTION[backbone]}.weight", ndim=4) for i in firsts]
    height, width = constant
    return EncoderConfig(
        backbone=backbone,
        widths=(stem.shape[0], *(weight.shape[0] for weight in convolutions)),
        units=units,
        num_ws=sum(re.fullmatch(r"styles\.\d+\.linear\.weight", name) is not None for name in state),
        w_dim=tensor(state, "styles.0.linear.weight", ndim=2).shape[0],
        image_size=(CROPPED_HEIGHT if crop else PUBLISHED_HEIGHT, PUBLISHED_HEIGHT * width // height),
        input_channels=stem.shape[1],
        pyramid=pyramid,
        offsets=offsets,
        crop=crop,
        iterations=1 if stem.shape[1] == 3 else PUBLISHED_ITERATIONS,
    )


def _constant(whole: Mapping[Any, Any]) -> tuple[int, int]:
    """Height and width of the constant input of the generator in the file, which has the images' proportions."""
    if "decoder.input.input" not in whole:
        return 1, 1
    height, width = tensor(whole, "decoder.input.input", ndim=4).shape[2:]
    return height, width


def _renamed(name: str) -> str:
    for theirs, ours in STEM_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _assemble(config: EncoderConfig, state: Mapping[str, Tensor]) -> StyleEncoder:
    """Encoder of this geometry with these weights, allocated only when all shapes are right."""
    check_count(config.num_ws, 2 * MAX_LEVELS, "style inputs")
    check_count(max(config.image_size), MAX_SIDE, "pixels per side")
    if config.num_ws + sum(config.units) > len(state):
        raise CheckpointError(f"a geometry of {config.num_ws} heads and {config.units} units in {len(state)} tensors")
    with torch.device("meta"):
        expected = StyleEncoder(config)
    return build(lambda: StyleEncoder(config), expected, state)
