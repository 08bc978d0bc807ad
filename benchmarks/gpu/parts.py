"""What the five parts run, most important first: the steps of each, in full size or as small as a dry run allows.

The limits of a part's steps may add up to more than its minutes: what does not fit is left out at the end. Knows the
arguments of the benchmarks. Does not run them.
"""

from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.geometries import random_checkpoint
from benchmarks.gpu.steps import Step
from handsoff_stream.checkpoint import save_checkpoint

PARTS = (1, 2, 3, 4, 5)
SIZES = (1024, 256, 512, 128)
WIDTHS = ((256, 32), (512, 256), (2048, 64))
"""Of the heads: HandsOff's, and two wider ones."""
BATCHES = {128: 400, 256: 200, 512: 60, 1024: 40}
"""Of 8 pairs that the stream delivers; the export writes as many."""
LOOP_CANDIDATES = {128: 40, 256: 24, 512: 12, 1024: 8}
BLOCK = ("--option", "filter=block")
"""Of a checkpoint with random weights, which has no scores that the rolling filter could start from."""
TRAINER_RESERVE_S = 60.0
"""Between the end of training and the limit of its step, for loading and saving."""


def steps_of(part: int, *, minutes: float, out: Path, dry_run: bool) -> list[Step]:
    """The steps of a part.

    Args:
        part: one of `PARTS`.
        minutes: that the part may take.
        out: the folder of its results; part 5 keeps its run there.
        dry_run: the same steps in the smallest size.
    """
    if dry_run:
        return _dry(part, out)
    if part == 5:
        return [_training(out, 60 * minutes)]
    return {1: _correct, 2: _pairs, 3: _beside_training, 4: _variants}[part]()


def _step(name: str, module: str, limit_s: float, *arguments: object) -> Step:
    return Step(f"{name}-cuda", f"benchmarks.{module}", tuple(map(str, arguments)), limit_s)


def _correct() -> list[Step]:
    heads = [
        _step(f"label_head-1024-{w1}-{w2}", "label_head", 100, "--case", "config-f-1024", "--hidden", w1, w2)
        for w1, w2 in WIDTHS
    ]
    return [
        _step("gpu_tests", "gpu.gpu_tests", 240),
        heads[0],
        _step("label_head-faces", "label_head", 90, "--case", "faces"),
        *heads[1:],
    ]


def _pairs() -> list[Step]:
    steps = []
    for size in SIZES:
        checkpoint = ("--checkpoint", f"config-f-{size}", *BLOCK)
        amount = ("--batches", BATCHES[size], "--loop-candidates", LOOP_CANDIDATES[size])
        steps += [
            _step(f"throughput-{size}", "throughput", 150, *checkpoint, *amount),
            _step(f"stages-{size}", "stages", 150, *checkpoint, "--dtype", "float16"),
        ]
    return steps


def _beside_training() -> list[Step]:
    def overlap(size: int) -> Step:
        options = ("--steps", 30, "--backbone", "resnet101", "--checkpoint", f"config-f-{size}", *BLOCK)
        return _step(f"overlap-{size}", "overlap", 130, *options)

    return [
        overlap(256),
        _step("memory", "memory", 270, "--pairs", 100_000, "--minutes", 3.5),
        overlap(1024),
    ]


def _variants() -> list[Step]:
    def whole(checkpoint: str) -> Step:
        return _step(f"variants-{checkpoint}", "gpu.variants", 180, "--checkpoint", checkpoint)

    compiled = ("--compile", "--batch", 16, "--samples", 0, "--repeats", 10, "--geometries")
    return [
        whole("faces"),
        whole("config-f-1024"),
        _step("synthesis-1024", "synthesis", 150, *compiled, 1024),
        whole("config-f-256"),
        _step("synthesis-256", "synthesis", 120, *compiled, 256),
    ]


def _training(out: Path, seconds: float) -> Step:
    run = ("--run", out / "training", "--seconds", max(1.0, seconds - TRAINER_RESERVE_S))
    settings = "--stages 64:400000 128:25000000 --batch 64 --workers 14 --sheet-every 200000".split()
    return _step("generator_training", "gpu.training", seconds, *run, *settings)


def _dry(part: int, out: Path) -> list[Step]:
    checkpoint = out / "tiny.safetensors"
    if not checkpoint.exists():
        tiny = random_checkpoint(16, channels=(8, 8, 8), hidden=(8, 8), members=2, classes=3)
        save_checkpoint(checkpoint, tiny)
    on_it = f"--checkpoint {checkpoint}"
    trainer = "--resolution 16 --channels 8 8 8 --z-dim 8 --mapping-layers 2 --batch 4 --images 8 --workers 0"
    small: dict[int, dict[str, tuple[str, str]]] = {
        1: {
            "gpu_tests": ("gpu.gpu_tests", f"--marker=not(gpu) --files {ROOT / 'tests' / 'test_uncertainty.py'}"),
            "label_head": ("label_head", f"--case {checkpoint} --repeats 1"),
        },
        2: {
            "throughput": ("throughput", f"{on_it} --batches 1 --batch-size 2 --loop-candidates 2"),
            "stages": ("stages", f"{on_it} --repeats 1 --matrix 32 --copy-mb 1"),
        },
        3: {
            "overlap": ("overlap", f"{on_it} --steps 1 --rounds 1 --batch-size 2 --backbone resnet18"),
            "memory": ("memory", f"{on_it} --pairs 10 --windows 5 --batch-size 2"),
        },
        4: {
            "variants": ("gpu.variants", f"{on_it} --repeats 1 --backend eager"),
            "synthesis": ("synthesis", f"--geometries {checkpoint} --batch 1 --repeats 1 --samples 0"),
        },
        5: {"generator_training": ("gpu.training", f"--run {out / 'training'} --seconds 20 {trainer}")},
    }
    return [
        Step(name, f"benchmarks.{module}", tuple(options.split()), limit_s=120)
        for name, (module, options) in small[part].items()
    ]
