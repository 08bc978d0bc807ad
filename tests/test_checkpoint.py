"""A checkpoint is one file that loads as it was saved, or is refused with one clear sentence."""

import copy
import json

import pytest
import torch
from conftest import assert_same, make_checkpoint, take
from safetensors.torch import load_file, save_file

from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, read_manifest, save_checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators import load_generator
from handsoff_stream.generators.published.native import MANIFEST_KEY
from handsoff_stream.geometry import Rectangle
from handsoff_stream.stream import HandsOffStream


def rewrite(source, target, *, change_manifest=None, change_tensors=None) -> None:
    """A copy of a checkpoint with its manifest or tensors tampered with."""
    manifest, tensors = read_manifest(source), load_file(source)
    for change, thing in ((change_manifest, manifest), (change_tensors, tensors)):
        if change is not None:
            change(thing)
    save_file(tensors, target, metadata={MANIFEST_KEY: json.dumps(manifest)})


def test_what_is_saved_comes_back_bit_by_bit(checkpoint, checkpoint_path):
    loaded = load_checkpoint(checkpoint_path)
    assert_same(list(loaded.tensors().values()), list(checkpoint.tensors().values()))
    assert loaded.tensors().keys() == checkpoint.tensors().keys()
    assert loaded.manifest() == checkpoint.manifest()
    assert loaded.heads["segmentation"].task == checkpoint.heads["segmentation"].task
    assert not any(p.requires_grad for p in loaded.generator.parameters())
    assert_same(take(HandsOffStream(loaded, device="cpu"), 8), take(HandsOffStream(checkpoint, device="cpu"), 8))


def test_the_manifest_says_what_the_file_is_without_its_weights(checkpoint_path):
    manifest = read_manifest(checkpoint_path)
    assert manifest["generator"]["family"] == "stylegan2"
    assert manifest["heads"]["segmentation"]["task"]["class_names"] == ["background", "skin", "hair"]
    assert manifest["output_size"] == [16, 16]
    assert len(manifest["calibration"]["scores"]["top10_mean"]) == 200
    assert len(manifest["fingerprint"]) == 64


def test_load_generator_reads_the_generator_of_a_checkpoint(checkpoint, checkpoint_path):
    generator = load_generator(checkpoint_path)
    assert_same(list(generator.state_dict().values()), list(checkpoint.generator.state_dict().values()))


def test_half_precision_storage_halves_the_file_and_keeps_its_own_fingerprint(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "half.safetensors", copy.deepcopy(checkpoint), half=True)
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    assert loaded.manifest()["fingerprint"] == read_manifest(tmp_path / "half.safetensors")["fingerprint"]
    assert loaded.manifest()["fingerprint"] != checkpoint.manifest()["fingerprint"]
    stored = load_file(tmp_path / "half.safetensors")
    assert all(t.dtype == (torch.float16 if t.ndim >= 2 else torch.float32) for t in stored.values())


def test_saving_in_half_precision_leaves_the_callers_weights_alone(checkpoint, tmp_path):
    before = checkpoint.manifest()["fingerprint"]
    save_checkpoint(tmp_path / "half.safetensors", checkpoint, half=True)
    assert checkpoint.manifest()["fingerprint"] == before


def test_the_fingerprint_follows_weights_and_options_but_not_provenance(checkpoint):
    import dataclasses

    base = checkpoint.manifest()["fingerprint"]
    assert make_checkpoint().manifest()["fingerprint"] == base
    assert make_checkpoint(seed=1).manifest()["fingerprint"] != base
    assert dataclasses.replace(checkpoint, truncation=0.5).manifest()["fingerprint"] != base
    assert dataclasses.replace(checkpoint, provenance={"by": "hand"}).manifest()["fingerprint"] == base


def test_a_failed_write_leaves_the_old_file_and_no_litter(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("handsoff_stream.files.tensors.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_weights_are_neither_written_nor_read(checkpoint, checkpoint_path, tmp_path):
    broken = copy.deepcopy(checkpoint)
    broken.generator.constant.data[0] = float("nan")
    with pytest.raises(CheckpointError, match="'generator.constant' holds NaN.*was not written"):
        save_checkpoint(tmp_path / "nan.safetensors", broken)
    assert not list(tmp_path.iterdir())

    rewrite(
        checkpoint_path,
        tmp_path / "nan.safetensors",
        change_tensors=lambda t: t["generator.constant"].fill_(float("inf")),
    )
    with pytest.raises(CheckpointError, match="constant holds NaN or infinite"):
        load_checkpoint(tmp_path / "nan.safetensors")


def test_a_missing_checkpoint_is_named_with_what_ships(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file, and no checkpoint of that name ships.*\['faces'\]"):
        load_checkpoint("facez")
    with pytest.raises(CheckpointError, match="no such file"):
        HandsOffStream(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_checkpoint_is_refused_wherever_it_was_cut(checkpoint_path, tmp_path, kept):
    whole = checkpoint_path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:kept])
    for read in (load_checkpoint, read_manifest, HandsOffStream, load_generator):
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read(cut)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a checkpoint at all")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        load_checkpoint(tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="without a readable handsoff_stream manifest"):
        load_checkpoint(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "format version 99.*upgrade"),
        (lambda m: m["generator"].update(family="stylegan9"), "family 'stylegan9' is unknown"),
        (lambda m: m["generator"]["config"].update(channels=[6, 5]), "tensors do not fit the geometry"),
        (lambda m: m["generator"]["config"].update(color="red"), "cannot be rebuilt"),
        (lambda m: m["heads"]["segmentation"]["task"].update(name="normals"), "task 'normals' is unknown"),
        (lambda m: m["heads"]["segmentation"]["label_generator"].update(members=2), "do not fit the geometry"),
        (lambda m: m.pop("truncation"), "truncation"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(checkpoint_path, tmp_path, change, message):
    rewrite(checkpoint_path, tmp_path / "odd.safetensors", change_manifest=change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "odd.safetensors")


def test_a_crop_is_read_by_the_names_of_its_edges(checkpoint, tmp_path):
    """Files written before edges had their present order store them in another one, under the same names."""
    cropped = checkpoint.cropped(Rectangle(top=2, left=4, bottom=14, right=10))
    save_checkpoint(tmp_path / "new.safetensors", cropped)
    earlier = {"top": 2, "bottom": 14, "left": 4, "right": 10}
    rewrite(
        tmp_path / "new.safetensors", tmp_path / "old.safetensors", change_manifest=lambda m: m.update(crop=earlier)
    )
    for name in ("new", "old"):
        loaded = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert loaded.crop == cropped.crop and loaded.size == (12, 6)
        assert loaded.manifest()["fingerprint"] == cropped.manifest()["fingerprint"]


def test_missing_tensors_are_named(checkpoint_path, tmp_path):
    rewrite(checkpoint_path, tmp_path / "odd.safetensors", change_tensors=lambda t: t.pop("generator.w_avg"))
    with pytest.raises(CheckpointError, match="w_avg is missing"):
        load_checkpoint(tmp_path / "odd.safetensors")


def test_calibration_scores_serve_only_the_options_they_were_made_with(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", seed=77)
    assert len(stream._source.calibration_scores(stream.options)) == 200
    for change in ({"truncation": 0.9}, {"noise": "none"}, {"score": "sum"}):
        other = HandsOffStream(checkpoint, device="cpu", filter="block", **change)
        assert other._source.calibration_scores(other.options) == []


def test_a_generator_alone_is_a_checkpoint_without_heads(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "generator.safetensors", Checkpoint(checkpoint.generator))
    assert load_checkpoint(tmp_path / "generator.safetensors").heads == {}
