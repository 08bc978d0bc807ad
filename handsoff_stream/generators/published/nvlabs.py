"""Adapter of NVlabs pickles of StyleGAN2: stylegan2-ada-pytorch, the stylegan3 repository, StyleGAN-Human.

A file is a dictionary of networks. Each network, and each of its layers, is a `Record` of class name and attributes.
The architecture is read from the attributes of the layers, because the code bases differ in the names and defaults of
their constructor arguments. All blocks become float32, including those that are marked as float16.

Knows the names in these files. Does not know pickles or arithmetic.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import MAX_LAYERS, MAX_LEVELS, check_count
from handsoff_stream.files.strict_pickle import Record, shown
from handsoff_stream.files.weights import tensor
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.layers import fir_kernel
from handsoff_stream.generators.published.assemble import assemble, center_of_truncation, estimate_center
from handsoff_stream.generators.stylegan2 import StyleGAN2

KINDS = ("weight", "bias")


def build(content: Any) -> tuple[Generator, str] | None:
    """Content of a file => generator and its source; None if the content is of another format.

    Raises:
        CheckpointError: there is no `G_ema`, or it is a StyleGAN3, or a StyleGAN2 with options that were never
            published.
    """
    if not isinstance(content, Mapping) or not any(isinstance(content.get(key), Record) for key in ("G", "G_ema")):
        return None
    network = content.get("G_ema")
    if not isinstance(network, Record):
        raise CheckpointError("a generator G without its running average G_ema; use a snapshot that has it")
    synthesis = _child(network, "synthesis")
    if "input" in _modules(synthesis) or "layer_names" in synthesis.state:
        raise CheckpointError(
            "an alias-free (StyleGAN3) generator, which is not supported; use a StyleGAN2 trained on the same images"
        )
    if "square" in network.state:
        source = "StyleGAN-Human"
    elif "num_fp16_res" in synthesis.state:
        source = "NVlabs/stylegan3 (StyleGAN2)"
    else:
        source = "NVlabs/stylegan2-ada-pytorch"
    return convert(network), f"{source}, G_ema"


def convert(network: Record) -> StyleGAN2:
    """The record of a network of class `Generator` => generator.

    Raises:
        CheckpointError: the network is no StyleGAN2, or has options that were never published.
    """
    mapping = _child(network, "mapping")
    blocks = _blocks(_child(network, "synthesis"))
    config, renamed = _mapping(mapping, network)
    config |= _synthesis_config(blocks)
    renamed["constant"] = _tensor(blocks[0], "const", ndim=3)
    for i, block in enumerate(blocks):
        renamed |= _block(block, f"blocks.{i}")
    w_avg = _find(mapping, "w_avg")
    if w_avg is None and config["label_dim"]:
        raise CheckpointError("a conditional generator without w_avg, the center of truncation; use another snapshot")
    renamed["w_avg"] = torch.zeros(config["w_dim"]) if w_avg is None else center_of_truncation(w_avg, config["w_dim"])
    generator = assemble(StyleGAN2, config, renamed)
    if w_avg is None:
        estimate_center(generator)
    return generator


def _mapping(mapping: Record, network: Record) -> tuple[dict[str, Any], dict[str, Tensor]]:
    depth = sum(re.fullmatch(r"fc\d+", name) is not None for name in _names(mapping))
    check_count(depth, MAX_LAYERS, "layers in its mapping network")
    layers = [_child(mapping, f"fc{i}") for i in range(depth)]
    if not layers or any(layer.state.get("activation") != "lrelu" for layer in layers):
        raise CheckpointError(
            "a mapping network without layers, or with another activation than leaky ReLU, which is not supported; use "
            "another StyleGAN2"
        )
    z_dim = network.state.get("z_dim")
    if type(z_dim) is not int:
        raise CheckpointError(
            "no z_dim in its Generator, which is no StyleGAN2 or damaged; use another copy of the file"
        )
    multiplier = _same([layer.state.get("bias_gain") for layer in layers], "learning-rate multipliers in its mapping")
    renamed = {f"mapping_network.{i}.{kind}": _tensor(layer, kind) for i, layer in enumerate(layers) for kind in KINDS}
    config = {
        "z_dim": z_dim,
        "w_dim": _tensor(layers[-1], "weight", ndim=2).shape[0],
        "mapping_layers": len(layers),
        "mapping_lr_multiplier": float(multiplier),
        "mapping_hidden": _tensor(layers[0], "weight", ndim=2).shape[0] if len(layers) > 1 else None,
        "label_dim": 0,
    }
    if _modules(mapping).get("embed") is not None:
        embedding = _child(mapping, "embed")
        renamed |= {f"label_embedding.{kind}": _tensor(embedding, kind) for kind in KINDS}
        config["label_features"], config["label_dim"] = _tensor(embedding, "weight", ndim=2).shape
    return config, renamed


def _synthesis_config(blocks: list[Record]) -> dict[str, Any]:
    layers = [layer for block in blocks for name, layer in _layers(block).items() if name != "skip"]
    clamp = _same([layer.state.get("conv_clamp") for layer in layers], "clamps in its layers")
    if any(layer.state.get("activation", "lrelu") != "lrelu" for layer in layers):
        raise CheckpointError(
            "a synthesis network with another activation than leaky ReLU, which is not supported; use another StyleGAN2"
        )
    return {
        "channels": [_tensor(_child(block, "conv1"), "weight", ndim=4).shape[0] for block in blocks],
        "constant_size": list(_tensor(blocks[0], "const", ndim=3).shape[1:]),
        "conv_clamp": None if clamp is None else float(clamp),
        "image_channels": _tensor(_child(blocks[-1], "torgb"), "weight", ndim=4).shape[0],
        "architecture": _same([block.state.get("architecture") for block in blocks], "architectures in its blocks"),
    }


def _blocks(synthesis: Record) -> list[Record]:
    """The blocks from the constant upwards; their names contain the heights of their maps."""
    heights = sorted(int(name[1:]) for name in _names(synthesis) if re.fullmatch(r"b\d{1,5}", name))
    check_count(len(heights), MAX_LEVELS, "blocks in its synthesis network")
    if not heights or heights != [heights[0] << i for i in range(len(heights))]:
        raise CheckpointError(
            f"a synthesis network with blocks of heights {heights}, which do not double; use another StyleGAN2"
        )
    return [_child(synthesis, f"b{height}") for height in heights]


def _block(block: Record, ours: str) -> dict[str, Tensor]:
    names = {"conv0": "up", "conv1": "conv", "torgb": "to_rgb", "skip": "skip"}
    renamed: dict[str, Tensor] = {}
    for theirs, layer in _layers(block).items():
        prefix = f"{ours}.{names[theirs]}"
        resampled = _find(layer, "resample_filter")
        if resampled is not None and not _is_usual_filter(resampled):
            raise CheckpointError(
                "a resampling filter other than [1, 3, 3, 1], which is not supported; use another StyleGAN2"
            )
        if theirs == "skip":
            renamed[f"{prefix}.weight"] = _tensor(layer, "weight")
            continue
        affine = _child(layer, "affine")
        renamed |= {
            f"{prefix}.conv.weight": _tensor(layer, "weight"),
            f"{prefix}.conv.affine.weight": _tensor(affine, "weight"),
            f"{prefix}.conv.affine.bias": _tensor(affine, "bias"),
            f"{prefix}.bias": _tensor(layer, "bias"),
        }
        if theirs != "torgb":
            renamed[f"{prefix}.noise_const"] = _tensor(layer, "noise_const", ndim=2)[None, None]
            renamed[f"{prefix}.noise_strength"] = _tensor(layer, "noise_strength")
    return renamed


def _layers(block: Record) -> dict[str, Record]:
    modules = _modules(block)
    return {name: _child(block, name) for name in ("conv0", "conv1", "torgb", "skip") if modules.get(name) is not None}


def _modules(record: Record) -> dict[str, Any]:
    modules = record.state.get("_modules")
    if not isinstance(modules, dict):
        raise CheckpointError(
            f"a {shown(record.class_name)} without modules, so the file is damaged; use another copy of it"
        )
    return modules


def _names(record: Record) -> list[str]:
    return [name for name, module in _modules(record).items() if isinstance(name, str) and module is not None]


def _child(record: Record, name: str) -> Record:
    child = _modules(record).get(name)
    if not isinstance(child, Record):
        raise CheckpointError(
            f"no module {name!r} in its {shown(record.class_name)}, which is no StyleGAN2 or damaged; use another copy "
            "of the file"
        )
    return child


def _find(record: Record, name: str) -> Tensor | None:
    """A parameter or buffer of a layer; looked up, since a hostile layer has a hundred thousand others."""
    for kind in ("_buffers", "_parameters"):
        named = record.state.get(kind)
        value = named.get(name) if isinstance(named, dict) else None
        if isinstance(value, Tensor):
            return value
    return None


def _tensor(record: Record, name: str, *, ndim: int | None = None) -> Tensor:
    return tensor({name: _find(record, name)}, name, ndim=ndim)


def _same(values: list[Any], what: str) -> Any:
    if any(type(v) not in (str, int, float, bool, type(None)) for v in values) or len(set(values)) != 1:
        raise CheckpointError(f"different or odd {what}, which no published generator has; use another StyleGAN2")
    return values[0]


def _is_usual_filter(kernel: Tensor) -> bool:
    return kernel.shape == (4, 4) and torch.allclose(kernel.float(), fir_kernel(), atol=1e-3)
