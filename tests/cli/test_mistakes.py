"""Mistakes on the command line are found before the work, in one printable sentence, and nothing is left behind.

One table: what is typed, and what is said. Each line runs in milliseconds, since nothing is computed.
"""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint
from PIL import Image
from typer.testing import CliRunner

from handsoff_stream.checkpoint import Checkpoint, save_checkpoint
from handsoff_stream.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the lines of the table name."""
    folder = tmp_path_factory.mktemp("place")
    checkpoint = make_checkpoint()
    save_checkpoint(folder / "c.safetensors", checkpoint)
    save_checkpoint(folder / "g.safetensors", Checkpoint(checkpoint.generator))
    for name in ("images", "masks"):
        (folder / name).mkdir()
        for i in range(2):
            pixels = np.full((16, 16), i, np.uint8)
            Image.fromarray(pixels if name == "masks" else np.stack([pixels] * 3, -1)).save(folder / name / f"{i}.png")
    (folder / "link.png").symlink_to(folder / "c.safetensors")
    (folder / "text.txt").write_text("text")
    os.mkfifo(folder / "pipe")
    for name in ("rosinality_32.pt", "label_generator/exp.json"):
        data = Path(__file__).parents[1] / "data" / name
        shutil.copy(data, folder / data.name.replace("_32", ""))
    return folder


LONG = "x" * 240
LABELLED = "--images images --labels masks --classes a,b"
MISTAKES = {
    # Output that cannot be written.
    "preview c.safetensors /dev/null": "is a device",
    "preview c.safetensors pipe": "is a device, pipe",
    "preview c.safetensors images": "is a folder",
    "preview c.safetensors link.png": "is a symbolic link",
    "preview c.safetensors c.safetensors": "is read and written at once",
    "preview c.safetensors text.txt/a.png": "is no folder",
    f"preview c.safetensors {LONG}.png": "a name of more than 200 bytes",
    "train c.safetensors c.safetensors": "is read and written at once",
    "train c.safetensors images": "is a folder",
    "train c.safetensors text.txt/a.pt": "is no folder",
    "train c.safetensors link.png": "is a symbolic link",
    f"train c.safetensors {LONG}.pt": "a name of more than 200 bytes",
    "export c.safetensors text.txt": "is no folder",
    "export c.safetensors text.txt/out": "is no folder",
    "demo --out text.txt": "is no folder",
    "convert rosinality.pt rosinality.pt": "is read and written at once",
    "convert rosinality.pt images": "is a folder",
    "convert rosinality.pt text.txt/a.safetensors": "is no folder",
    "fit g.safetensors --out g.safetensors": "is read and written at once",
    "fit g.safetensors --out images": "is a folder",
    "fit g.safetensors --out text.txt/a.safetensors": "is no folder",
    f"fit g.safetensors --out {LONG}.safetensors": "a name of more than 200 bytes",
    "fit g.safetensors --out a.safetensors --latents text.txt": "is no folder",
    "train-encoder g.safetensors images g.safetensors": "is read and written at once",
    "train-encoder g.safetensors images text.txt/e.safetensors": "is no folder",
    "invert g.safetensors images text.txt": "is no folder",
    "sample g.safetensors text.txt": "is no folder",
    "import-labels rosinality.pt exp.json exp.json": "is read and written at once",
    # Counts and sizes.
    "preview c.safetensors a.png --num 0": "--num",
    "preview c.safetensors a.png --num 1000000000": "--num",
    "preview c.safetensors a.png --num 1e9": "--num",
    "export c.safetensors out --num 0": "--num",
    "export c.safetensors out --num -1": "--num",
    "export c.safetensors out --num 1000000000000 --shard-size 1": "at most 1000000 shards",
    "export c.safetensors out --shard-size 0": "--shard-size",
    "train c.safetensors a.pt --steps 0": "--steps",
    "train c.safetensors a.pt --batch-size 1": "--batch-size",
    "train c.safetensors a.pt --batch-size 1000000": "--batch-size",
    "train c.safetensors a.pt --lr 0": "positive learning rate",
    "train c.safetensors a.pt --lr nan": "positive learning rate",
    "train c.safetensors a.pt --backbone resnet9000": "resnet9000",
    "demo --steps 0": "--steps",
    "demo --test-images 0": "--test-images",
    "fit g.safetensors --out a.safetensors --epochs 0": "--epochs",
    "fit g.safetensors --out a.safetensors --epochs -3": "--epochs",
    "fit g.safetensors --out a.safetensors --hidden 0 0": "hidden=(0, 0)",
    "fit g.safetensors --out a.safetensors --hidden 1000000 1000000": "numbers from 1 to 8192",
    "fit g.safetensors --out a.safetensors --hidden 8": "--hidden",
    "fit g.safetensors --out a.safetensors --patience 0": "--patience",
    "fit g.safetensors --out a.safetensors --steps -1": "--steps",
    "fit g.safetensors --out a.safetensors --label-size 0": "--label-size",
    "fit g.safetensors --out a.safetensors --label-size 1000000": "--label-size",
    "fit g.safetensors --out a.safetensors --smallest-region -1": "--smallest-region",
    "fit g.safetensors --out a.safetensors --augmentations 1000000": "--augmentations",
    "fit g.safetensors --out a.safetensors --calibration-samples 1000000000": "--calibration-samples",
    "fit g.safetensors --out a.safetensors --memory-gb 0": "memory_gb=0.0",
    "fit g.safetensors --out a.safetensors --memory-gb -1": "memory_gb=-1.0",
    "fit g.safetensors --out a.safetensors --memory-gb nan": "memory_gb=nan",
    "sample g.safetensors out --num 0": "--num",
    "sample g.safetensors out --num 1000000000": "--num",
    "sample g.safetensors out --candidates 1000000000": "--candidates",
    "train-encoder g.safetensors images e.safetensors --steps 0": "--steps",
    # Devices, seeds, numbers.
    "fit g.safetensors --out a.safetensors --device gpu": "device 'gpu' is unknown",
    "fit g.safetensors --out a.safetensors --device cuda:99": "CUDA device",
    "invert g.safetensors images out --device cuda:99": "CUDA device",
    "sample g.safetensors out --device gpu": "device 'gpu' is unknown",
    "train-encoder g.safetensors images e.safetensors --device cuda:99": "CUDA device",
    "sample g.safetensors out --seed -1": "addresses no stream",
    "sample g.safetensors out --truncation nan": "is no psi",
    "fit g.safetensors --out a.safetensors --radius -1 --encoder text.txt": "radius=-1.0",
    "preview c.safetensors a.png --device gpu": "device 'gpu' is unknown",
    "preview c.safetensors a.png --device cuda:99": "CUDA device",
    "preview c.safetensors a.png --device meta": "is not supported",
    "train c.safetensors a.pt --device gpu": "device 'gpu' is unknown",
    "export c.safetensors out --device cpu:x": "is unknown",
    "demo --device gpu": "device 'gpu' is unknown",
    "preview c.safetensors a.png --seed -1": "addresses no stream",
    "export c.safetensors out --seed 18446744073709551616": "addresses no stream",
    "preview c.safetensors a.png --truncation nan": "is no psi",
    "preview c.safetensors a.png --truncation 1e400": "is no psi",
    "export c.safetensors out --precision half": "--precision",
    # Options that need another one.
    "train c.safetensors a.pt --test-images images": "--test-labels",
    "train c.safetensors a.pt --test-labels masks": "--test-images",
    "fit g.safetensors --out a.safetensors --flip": "no augmentations to flip",
    "fit g.safetensors --out a.safetensors --any-color b": "no augmentations to flip or recolor",
    "fit g.safetensors --out a.safetensors --radius 3": "--encoder",
    "fit g.safetensors --out a.safetensors --latents l --given-latents l.npy": "pass one of them",
    "fit g.safetensors --out a.safetensors --latent-truncation 0.5": "latents w+",
    "fit g.safetensors --out a.safetensors --latent-space z": "none are given",
    "fit g.safetensors --out a.safetensors --class-map celebamask_hq_8": "both --class-map and --classes",
    "fit g.safetensors --out a.safetensors --crop-box 1,2": "TOP,LEFT,BOTTOM,RIGHT",
    # Files that are no checkpoints.
    "inspect text.txt": "none of safetensors",
    "inspect images": "no such file",
    "inspect pipe": "no such file",
    "inspect /dev/zero": "no such file",
    "inspect --scan missing": "no such file or folder",
    "inspect \x1b[31mred": "\\x1b[31mred: no such file",
    "preview g.safetensors a.png": "no labelling head",
    "export g.safetensors out": "no labelling head",
    "train g.safetensors a.pt": "no segmentation head",
    "preview missing a.png": "no such file",
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p): (stat.S_IFMT(p.lstat().st_mode), p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir()
    }


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line[:60].encode("unicode_escape").decode())
def test_a_mistake_is_named_before_the_work(place, monkeypatch, line):
    monkeypatch.chdir(place)
    before, started = snapshot(place), time.process_time()
    arguments = line.split(" ")
    if arguments[0] == "fit":
        arguments += LABELLED.split(" ")
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2 and time.process_time() - started < 5
    said = " ".join(result.output.replace("│", " ").split())
    assert MISTAKES[line] in said
    assert "Traceback" not in said and "\x1b" not in said
    if said.startswith("handsoff-stream"):
        assert result.output.count("\n") == 1 and len(said) <= 320
    assert snapshot(place) == before


FILL = {
    "preview": ("preview {place}/c.safetensors {out} --num 16 --device cpu", "a.png"),
    "convert": ("convert {place}/rosinality.pt {out}", "a.safetensors"),
    "export": ("export {place}/c.safetensors {folder} --num 40 --shard-size 40 --device cpu", "shard-000000.tar"),
}


@pytest.mark.parametrize("verb", FILL)
def test_a_full_disk_keeps_the_old_file_and_is_one_sentence(place, tmp_path, verb):
    """RLIMIT_FSIZE fails the write half-way, as a full disk does."""
    line, name = FILL[verb]
    out = tmp_path / name
    if verb != "export":  # which would refuse a shard that it does not know
        out.write_bytes(b"old")
    arguments = line.format(place=place, out=out, folder=tmp_path).split(" ")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        f"sys.argv[1:] = {arguments!r}; from handsoff_stream.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("handsoff-stream: ") and "cannot be written (files may not be as large)" in last
    assert "Traceback" not in done.stderr
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.pop("export.json", None) is None or verb == "export"
    assert left == ({} if verb == "export" else {name: b"old"})


def test_a_second_export_into_a_folder_is_told(place, tmp_path):
    hold = (
        "import sys, time; from handsoff_stream.files.atomic import locked_folder\n"
        f"with locked_folder({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    )
    arguments = ["export", str(place / "c.safetensors"), str(tmp_path), "--num", "2", "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        result = CliRunner().invoke(app, arguments)
        process.kill()
    assert result.exit_code == 2 and "another process is writing to it" in result.output
    assert CliRunner().invoke(app, arguments).exit_code == 0
