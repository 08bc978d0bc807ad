"""Files that once broke a rule are refused with one printable line, on the command line and in the library."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, read_manifest, save_checkpoint
from handsoff_stream.cli import app
from handsoff_stream.cli.app import cell, tell
from handsoff_stream.config import load_class_map
from handsoff_stream.downstream.metrics import SegmentationScores
from handsoff_stream.errors import CheckpointError, OutputError, printable
from handsoff_stream.fitting.inversion.latents import read_latent
from handsoff_stream.fitting.published import read_latents
from handsoff_stream.inspect import describe

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"
SHOWN = "\x1b]0;pwned\x07\x1b[2J\u202e\x00[bold red]name[/]"


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.safetensors")), ids=lambda path: path.stem[:40])
def test_checkpoints(path):
    for read in (load_checkpoint, read_manifest, describe):
        if (
            read is read_manifest
            and path.stem in ("st_dtype_F8_E4M3", "st_name_escape")
            or "lr_multiplier" in path.stem
        ):
            continue  # nothing is wrong with their manifests that a schema could see
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(caught.value).isprintable() and len(str(caught.value)) <= 300
    code, output = run("inspect", path)
    assert code == 2 and output.startswith("handsoff-stream: ") and output.count("\n") == 1
    assert output.strip().isprintable() and len(output) <= 320


def test_latents():
    path = HOSTILE / "nd_float_0d_in_dict.npy"
    with pytest.raises(CheckpointError, match="no latent for"):
        read_latents(path, ["a"])
    with pytest.raises(ValueError, match="not the float latent"):
        read_latent(path)


def test_latents_that_are_no_numbers_are_refused(tmp_path):
    broken = np.full((2, 6, 8), np.nan, np.float32)
    np.save(tmp_path / "w.npy", broken)
    np.save(tmp_path / "one.npy", broken[0])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read_latents(tmp_path / "w.npy", ["0", "1"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_latent(tmp_path / "one.npy")


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.yaml")), ids=lambda path: path.stem)
def test_class_maps(path):
    with pytest.raises(ValueError, match="line|nested") as caught:
        load_class_map(path)
    assert str(caught.value).isprintable()


def test_control_characters_and_marks_of_direction_are_shown_not_obeyed():
    shown = printable(SHOWN)
    assert shown.isprintable() and "\\x1b]0;pwned\\x07" in shown and "\\u202e" in shown and "[bold red]" in shown


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    message = printable("path: " + "x" * 10_000 + "; copy the file again")
    assert len(message) == 300 and message.startswith("path: x") and message.endswith("copy the file again")
    for error in (CheckpointError, OutputError):
        assert str(error("a\nb" + "\x1b" * 500)).isprintable() and len(str(error("x" * 10**6))) <= 300


def test_what_files_say_is_no_markup(capsys):
    tell(SHOWN)
    out = capsys.readouterr().out
    assert "[bold red]name[/]" in out and "\x1b" not in out and "\x00" not in out
    assert "[bold red]" in cell(SHOWN).plain
    scores = SegmentationScores(0.5, (0.5, 0.5), 0.5, ("[/]" + SHOWN, "b"), 1)
    from rich.console import Console

    with (console := Console(width=200)).capture() as captured:
        console.print(scores.table())
    assert "[/]" in captured.get() and "\x1b]" not in captured.get()


def test_names_in_a_valid_checkpoint_reach_the_terminal_as_they_are(tmp_path):
    source = make_checkpoint()
    provenance = {"[red]key[/red]": "[link=file:///etc/passwd]x[/link]", "closed": "[/]", "turned": "a\u202eb"}
    save_checkpoint(tmp_path / "[b].safetensors", Checkpoint(source.generator, source.heads, provenance=provenance))
    code, output = run("inspect", tmp_path / "[b].safetensors")
    assert code == 0
    for part in ("[red]key[/red]", "[link=file:///etc/passwd]x[/link]", "[/]", "a\\u202eb", "[b].safetensors"):
        assert part in output, part
    code, output = run("preview", tmp_path / "[b].safetensors", tmp_path / "[green].png", "--num", 1, "--device", "cpu")
    assert code == 0 and "[green].png" in "".join(output.split("\n"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(truncation=float("nan")), "holds nan at truncation"),
        (lambda m: m.update(unheard_of=1), "unheard_of: extra inputs are not permitted"),
        (
            lambda m: m["calibration"]["scores"].update(sum=[1.0, float("inf")]),
            r"holds inf at calibration.scores.sum.1",
        ),
        (lambda m: m["calibration"].update(scores={"sum": ["a"]}), "calibration.scores.sum.0: .*'a' came"),
        (lambda m: m["heads"].update({"../x": m["heads"]["segmentation"]}), "letters, digits"),
        (lambda m: m["generator"]["config"].update(conv_clamp=-1.0), "conv_clamp=-1.0"),
        (lambda m: m["generator"]["config"].update(conv_clamp="wide"), "conv_clamp: .*'wide' came"),
        (lambda m: m["generator"]["config"].update(mapping_lr_multiplier=0), "pass positive numbers"),
        (lambda m: m["generator"]["config"].update(channels=[True, 5, 4]), "channels.0: .*valid integer"),
        (lambda m: m["heads"]["segmentation"]["task"].update(palette=[[0, 0]] * 3), "palette"),
        (lambda m: m["heads"]["segmentation"]["task"].update(class_names="abc"), "class_names"),
        (lambda m: m["heads"]["segmentation"]["label_generator"].update(num_outputs=4), "labels 4 outputs"),
        (lambda m: m["heads"]["segmentation"]["label_generator"].update(feature_channels=[30]), "channels; its task"),
        (lambda m: m.update(fingerprint="x"), "fingerprint"),
        (lambda m: m.update(format_version=True), "format_version|describes no generator"),
        (lambda m: m.update(provenance=[]), "provenance"),
    ],
)
def test_a_manifest_says_what_the_schema_has_and_nothing_else(checkpoint_path, tmp_path, monkeypatch, change, match):
    manifest, tensors = read_manifest(checkpoint_path), load_file(checkpoint_path)
    change(manifest)
    monkeypatch.chdir(tmp_path)  # a message has a greatest length, and a long path would take its part of it
    save_file(tensors, "odd.safetensors", metadata={"handsoff_stream": json.dumps(manifest)})
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint("odd.safetensors")


def test_tensors_of_no_part_are_refused(checkpoint_path, tmp_path):
    tensors = {**load_file(checkpoint_path), "\x1b[2Jelse": torch.ones(1)}
    metadata = {"handsoff_stream": json.dumps(read_manifest(checkpoint_path))}
    save_file(tensors, tmp_path / "odd.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"1 tensors belong to no part of it, such as '\\x1b\[2Jelse'"):
        load_checkpoint(tmp_path / "odd.safetensors")
