"""StyleGAN2's synthesis: images per second and precision of the folded network, against the steps of the paper.

    python -m benchmarks.synthesis
    python -m benchmarks.synthesis --geometries 1024 --samples 0
    python -m benchmarks.synthesis --compile

Three variants compute the same images from the same weights and latents. They take turns in one process, and the
shortest time of each counts:

- plain: per-sample weights and grouped convolutions in float32, `reference.plain_stylegan2`;
- exact: the folded network in float32 (convolutions on CUDA without TF32);
- fast: the folded network in half precision, float16 on CUDA, bfloat16 on a CPU.

With `--compile`, `exact` and `fast` run through `torch.compile` too, and the seconds of their first calls are given.

A geometry is the name or path of a checkpoint, or the size in pixels of a config-F generator with random weights.
Precision is measured on a checkpoint, `fast` against `exact`: PSNR of the 8-bit images, errors of the feature maps, and
the share of label pixels that change although both are labelled in float32. The last line of the output is the result
as JSON.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import parser, result_name, settings, short_path, synchronize, write_result
from benchmarks.geometries import config_f_channels
from benchmarks.reference.plain_stylegan2 import plain_synthesis
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream import load_checkpoint
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators import Generator, StyleGAN2, Synthesis
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.seeding import latents
from handsoff_stream.synthesizer import Synthesizer, quantize

SEED = 1
TRUNCATION = 0.7
PRECISION_BATCH = 2


def build(geometry: str) -> StyleGAN2:
    """The generator of a checkpoint, or a config-F generator of that size with random weights.

    Raises:
        ValueError: the checkpoint's generator is of another family.
    """
    if geometry.isdecimal():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return StyleGAN2(channels=config_f_channels(int(geometry))).eval().requires_grad_(False)
    generator = load_checkpoint(geometry).generator
    if not isinstance(generator, StyleGAN2):
        raise ValueError(
            f"{geometry} holds a {generator.family} generator, which has no plain variant to compare with; pass a "
            "StyleGAN2"
        )
    return generator


def styles(generator: Generator, indices: range, device: torch.device) -> Tensor:
    """w+ of the samples `indices`, float32 [B, L, D], truncated as in a stream."""
    z = latents(SEED, indices, generator.z_dim).to(device)
    return generator.truncate(generator.mapping(z), TRUNCATION)


def take_turns(variants: Mapping[str, Callable[[], object]], *, device: torch.device, repeats: int) -> dict[str, float]:
    """Shortest seconds of each variant; they take turns, so that other load on the machine meets all of them."""
    shortest = dict.fromkeys(variants, math.inf)
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if repeat > 0:  # the first turn warms up
                shortest[name] = min(shortest[name], time.perf_counter() - start)
    return shortest


@torch.inference_mode()
def speed(geometry: str, args: argparse.Namespace, device: torch.device, half: torch.dtype) -> dict[str, Any]:
    """Images per second of each variant, how many times faster it is than `plain`, and how far `exact` is from `plain`.

    Args:
        geometry: checkpoint or size, see `build`.
        args: has `batch`, `repeats` and `compile`.
        device: where to compute.
        half: dtype of `fast`.
    """
    generator = build(geometry).to(device)
    w_plus = styles(generator, range(args.batch), device)
    exact, fast = generator.fold(), generator.fold(half)
    variants = {
        "plain": lambda: plain_synthesis(generator, w_plus, exact.noise_const),
        "exact": lambda: exact(w_plus),
        "fast": lambda: fast(w_plus),
    }
    difference = max_difference(variants["exact"](), variants["plain"]())
    compile_s: dict[str, float] = {}
    if args.compile:
        for name, folded in (("exact", exact), ("fast", fast)):
            compiled = torch.compile(folded)
            variants[f"{name}, compiled"] = functools.partial(compiled, w_plus)
            start = time.perf_counter()
            compiled(w_plus)
            synchronize(device)
            compile_s[name] = time.perf_counter() - start
    seconds = take_turns(variants, device=device, repeats=args.repeats)
    return {
        "geometry": short_path(geometry),
        "images_per_s": {name: args.batch / s for name, s in seconds.items()},
        "times_plain": {name: seconds["plain"] / s for name, s in seconds.items()},
        "exact_max_difference": difference,
        "first_call_compiled_s": compile_s,
    }


def max_difference(a: Synthesis, b: Synthesis) -> float:
    """Largest absolute difference of any value of the images or feature maps."""
    pairs = [(a.images, b.images), *zip(a.features.maps, b.features.maps, strict=True)]
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


@torch.inference_mode()
def precision(name: str, samples: int, device: torch.device, half: torch.dtype) -> dict[str, Any]:
    """What half precision changes in a checkpoint's images, feature maps, and labels of its first head."""
    synthesizer = Synthesizer(replace(load_checkpoint(name), crop=None), SynthesisOptions(seed=SEED), device)
    generator = synthesizer.generator
    exact, fast = generator.fold(), generator.fold(half)
    batches = []
    for start in range(0, samples, PRECISION_BATCH):
        w_plus = styles(generator, range(start, start + PRECISION_BATCH), device)
        batches.append(compare(synthesizer, exact(w_plus), fast(w_plus)))
    mean = {key: sum(batch[key] for batch in batches) / len(batches) for key in batches[0]}
    return {
        "checkpoint": short_path(name),
        "samples": len(batches) * PRECISION_BATCH,
        "psnr_db": -10 * math.log10(max(mean["squared_error"], 1e-12)),
        "changed_labels": mean["changed_labels"],
        "feature_relative_error": mean["feature_relative_error"],
        "feature_max_error": max(batch["feature_max_error"] for batch in batches),
    }


def compare(synthesizer: Synthesizer, exact: Synthesis, fast: Synthesis) -> dict[str, float]:
    """One batch: squared error of images in [0, 1], share of changed labels, errors of the worst feature map.

    `feature_relative_error` is relative in the Euclidean norm of the map; `feature_max_error` is the largest error
    relative to the largest value of the map.
    """
    head = next(iter(synthesizer.labeller.tasks))
    maps = tuple(m.float() for m in fast.features.maps)
    images = [quantize(s.images, synthesizer.size) for s in (exact, fast)]
    labels = [synthesizer.label(head, features)[0] for features in (exact.features, FeaturePyramid(maps))]
    pairs = list(zip(maps, exact.features.maps, strict=True))
    return {
        "squared_error": (images[0] - images[1]).square().mean().item(),
        "changed_labels": (labels[0] != labels[1]).float().mean().item(),
        "feature_relative_error": max(((got - want).norm() / want.norm()).item() for got, want in pairs),
        "feature_max_error": max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs),
    }


def rows(result: Result) -> list[Row]:
    """Every variant of every geometry against the plain one."""
    formats = {"exact": "float32", "fast": result["fast"]}

    def description(case: Result, name: str) -> str:
        variant, *compiled = name.split(", ")
        first_call = f", torch.compile (first call {case['first_call_compiled_s'][variant]:.0f} s)" if compiled else ""
        return f"{formats[variant]}{first_call}"

    return [
        Row(
            f"synthesis of {_geometry(case)}, {description(case, name)}",
            f"{case['images_per_s'][name]:.3g} images/s",
            f"per-sample weights, float32: {case['images_per_s']['plain']:.3g} images/s",
            case["times_plain"][name],
        )
        for case in result["speed"]
        for name in case["times_plain"]
        if name != "plain"
    ]


def _geometry(case: Result) -> str:
    return f"config-f-{case['geometry']}" if case["geometry"].isdecimal() else str(case["geometry"])


def charts(result: Result) -> list[Chart]:
    """Images per second of each variant, one chart per geometry."""
    return [Chart(f"{_geometry(case)}: images per second", [*case["images_per_s"].items()]) for case in result["speed"]]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    """Measure, print a table, and write the result."""
    options = parser(__doc__, name="synthesis")
    options.add_argument("--geometries", nargs="+", default=["faces", "256", "512"], help="checkpoints, or sizes")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--compile", action="store_true", help="torch.compile too")
    options.add_argument("--checkpoint", default="faces", help="for the precision")
    options.add_argument("--samples", type=int, default=50, help="for the precision; 0 leaves it out")
    args = options.parse_args()

    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = False
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    compiled = ("exact, compiled", "fast, compiled") if args.compile else ()
    names = ("plain", "exact", "fast", *compiled)
    table = Table("geometry", *names, title="images/s (times plain)")
    speeds = []
    for geometry in args.geometries:
        speeds.append(speed(geometry, args, device, half))
        rate, ratio = speeds[-1]["images_per_s"], speeds[-1]["times_plain"]
        table.add_row(geometry, *(f"{rate[name]:.2f} ({ratio[name]:.2f})" for name in names))
    Console().print(table)
    fast = str(half).removeprefix("torch.")
    record = {"settings": settings(args), "fast": fast, "speed": speeds, "precision": None}
    if args.samples:
        record["precision"] = precision(args.checkpoint, args.samples, device, half)
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
