"""SIGKILL at any moment leaves only whole files, and the next run continues and ends with the same bytes.

A run is a forked child of this process, which has imported everything already: a hundred runs take a few seconds.
"""

import multiprocessing
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint
from torch import Tensor

from handsoff_stream.checkpoint import save_checkpoint
from handsoff_stream.fitting import write_samples
from handsoff_stream.fitting.inversion.descent import InversionSettings
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.fitting.inversion.store import invert_images
from handsoff_stream.outlets.webdataset import write_shards
from handsoff_stream.stream import HandsOffStream

FORK = multiprocessing.get_context("fork")


class Blurred(Perceptual):
    """A perceptual distance in one line: images at a quarter of the size."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), "blurred")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images_BCHW, 4).flatten(1) / 10


def export(folder: Path) -> None:
    stream = HandsOffStream(make_checkpoint(num_calibration=20), batch_size=4, device="cpu")
    write_shards(stream, folder, num_samples=48, shard_size=6)


def inversion(folder: Path) -> None:
    generator = make_checkpoint(num_calibration=4).generator
    images = [(f"i{i}", torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    invert_images(generator, images, folder, Blurred(), InversionSettings(steps=2, candidates=2), batch_size=1)


def samples(folder: Path) -> None:
    write_samples(make_checkpoint(num_calibration=4), folder, num=12, device="cpu")


def checkpoint(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for seed in range(6):
        save_checkpoint(folder / f"{seed}.safetensors", make_checkpoint(seed, num_calibration=4))


WRITERS: dict[str, Callable[[Path], None]] = {
    "export": export,
    "inversion": inversion,
    "samples": samples,
    "checkpoint": checkpoint,
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(write: Callable[[Path], None], folder: Path, seconds: float | None = None) -> int | None:
    """Exit code of a run; it is killed after so many seconds."""
    process = FORK.Process(target=write, args=(folder,))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def kill_often(name: str, folder: Path, kills: int, seed: int) -> int:
    """Kill runs at random moments until so many were killed; returns how many folders came to their end meanwhile."""
    write, rng = WRITERS[name], random.Random(seed)
    write(folder / "first")  # here, so that the children find everything imported
    started = time.monotonic()
    assert run(write, folder / "whole") == 0
    longest = time.monotonic() - started
    whole = content(folder / "whole")
    killed = finished = 0
    while killed < kills:
        target = folder / f"cut-{finished}"
        code: int | None = -9
        while code == -9 and killed < kills:
            code = run(write, target, rng.uniform(0, longest))
            killed += code == -9
            visible = {p: data for p, data in content(target).items() if "/." not in f"/{p}"}
            assert {p for p, data in visible.items() if whole.get(p) != data} <= {"export.json"}
        if code == -9:
            code = run(write, target)
        assert code == 0 and content(target) == whole
        finished += 1
    return finished


@pytest.mark.parametrize("name", WRITERS)
def test_a_few_kills(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kill_often(name, tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("export", 40), ("inversion", 30), ("samples", 20), ("checkpoint", 10)])
def test_a_hundred_kills(tmp_path, name, kills):
    print(f"{name}: {kills} kills, {kill_often(name, tmp_path, kills, seed=1)} folders came to their end")
