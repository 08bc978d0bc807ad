"""The examples run as their docstrings say, with smaller counts, and do what they claim."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, labelled_faces

EXAMPLES = Path(__file__).parent.parent / "examples"
MAX_LINES = 60


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example with these arguments; returns the lines that it prints."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_shows_its_command(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")


def test_deeplabv3_trains_on_the_stream_and_is_scored_per_class(run):
    lines = run("train_deeplabv3.py", "--steps", 1, "--batch-size", 2, "--test-images", 2)
    scores = dict(line.split() for line in lines)
    assert scores.keys() >= {"skin", "hat", "mIoU"} and all(0 <= float(score) <= 1 for score in scores.values())


def test_half_of_each_batch_of_the_mixture_is_labelled_images_of_the_faces_or_of_folders(run, tmp_path):
    common = ["--steps", 2, "--batch-size", 4, "--out", tmp_path / "deeplab.pt"]
    assert run("train_on_mixture.py", *common)[-1].endswith("2 of 4 labelled")
    for i in range(2):
        image, mask = labelled_faces(2)[i]
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(
            made(tmp_path / "photos") / f"{i}.png"
        )
        Image.fromarray(mask.byte().numpy()).save(made(tmp_path / "masks") / f"{i}.png")
    lines = [f"  {i}: {{name: {name}, from_ids: [{i}]}}" for i, name in enumerate(CLASS_NAMES)]
    (tmp_path / "classes.yaml").write_text("\n".join(["classes:", *lines, ""]))
    folders = [
        "--images",
        tmp_path / "photos",
        "--labels",
        tmp_path / "masks",
        "--class-map",
        tmp_path / "classes.yaml",
    ]
    assert run("train_on_mixture.py", *common, *folders, "--share", 0.25)[-1].endswith("1 of 4 labelled")
    assert torch.load(tmp_path / "deeplab.pt", weights_only=True)


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_a_second_run_trains_on_the_batches_that_follow(run, tmp_path):
    def steps(file: str, count: int) -> list[str]:
        return run("resume_training.py", tmp_path / file, "--steps", count, "--batch-size", 2)

    assert steps("one.pt", 2) == steps("two.pt", 1) + steps("two.pt", 1)


def test_shards_hold_what_was_exported_and_a_repeated_command_adds_nothing(run, tmp_path):
    wrote, read = run("export_and_read_shards.py", tmp_path, "--num", 6, "--shard-size", 4)
    assert wrote == f"wrote 2 shards to {tmp_path}" and read == "read 6 samples of 128 x 128 pixels"
    shards = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert run("export_and_read_shards.py", tmp_path, "--num", 6, "--shard-size", 4) == [wrote, read]
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == shards
