"""`benchmarks.generator` in its smallest configuration: what it measures of whom, and what it refuses."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import common, generator
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from handsoff_stream.generators.stylegan2 import StyleGAN2
from recipes.faces.quality import Teacher


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """Run it on files, with a judge that has learned next to nothing; returns what it prints and writes."""

    def measured(*files: object) -> dict:
        arguments = ["--images", "8", "--teacher", tmp_path / "judge.safetensors", "--teacher-steps", "2"]
        arguments += ["--sheet", tmp_path, "--device", "cpu", "--checkpoints", *files]
        monkeypatch.setattr(common, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [generator.__file__, *map(str, arguments)])
        generator.main()
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads((tmp_path / "generator.json").read_text()) == result
        return result

    return measured


def test_generators_and_renders_stand_side_by_side(measured, checkpoint_path, tmp_path):
    size = load_checkpoint(checkpoint_path).generator.resolution[0]
    torch.manual_seed(0)
    other = StyleGAN2(channels=(8,) * (size.bit_length() - 2), z_dim=8, w_dim=8, mapping_layers=2)
    save_checkpoint(tmp_path / "other.safetensors", Checkpoint(other))
    result = measured(checkpoint_path, tmp_path / "other.safetensors")
    expected = ["other renders", *(f"{name}, psi {psi}" for name in ("tiny", "other") for psi in (1.0, 0.7))]
    assert list(result["sets"]) == expected
    for quality in result["sets"].values():
        assert 0 <= quality["precision"] <= 1 and 0 <= quality["recall"] <= 1
        assert quality["shares"].keys() == result["true_shares"].keys() == {"glasses", "hat"}
    assert all((tmp_path / f"{name}.png").exists() for name in ("tiny", "other"))
    assert str(tmp_path) not in json.dumps(result)
    Teacher().load_state_dict(load_file(tmp_path / "judge.safetensors"))  # kept for the next run
    assert len(generator.rows(result)) == 4


def test_two_files_of_one_name_are_refused(measured, checkpoint_path, tmp_path):
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / checkpoint_path.name
    copy.write_bytes(checkpoint_path.read_bytes())
    with pytest.raises(SystemExit, match="two of the files are named 'tiny'"):
        measured(checkpoint_path, copy)
