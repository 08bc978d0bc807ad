"""A stream belongs to one checkpoint: everything that decides samples is its identity, and changes are noticed."""

import copy
import dataclasses
import os

import pytest
import torch
from conftest import assert_same, make_checkpoint, take
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from handsoff_stream.checkpoint import Calibration, Checkpoint, save_checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.geometry import Rectangle
from handsoff_stream.labeller import on_device
from handsoff_stream.source import CheckpointSource, identity
from handsoff_stream.stream import HandsOffStream


def fingerprint(checkpoint: Checkpoint) -> str:
    return CheckpointSource(checkpoint).fingerprint


def test_the_identity_covers_all_that_decides_samples(checkpoint):
    head = checkpoint.heads["segmentation"]
    other = make_checkpoint(seed=1, num_calibration=1)
    scores = dict(checkpoint.calibration.scores, top10_mean=[0.5] * 10)
    changes = {
        "heads": {"heads": {"a": head, "b": other.heads["segmentation"]}},
        "heads in another order": {"heads": {"b": other.heads["segmentation"], "a": head}},
        "names": {"heads": {"other": head}},
        "weights": {"generator": other.generator},
        "calibration": {"calibration": Calibration(checkpoint.calibration.options, scores)},
        "no calibration": {"calibration": None},
        "truncation": {"truncation": 0.6},
        "size": {"output_size": (32, 32)},
        "crop": {"crop": Rectangle(2, 0, 14, 16)},
    }
    found = [fingerprint(dataclasses.replace(checkpoint, **change)) for change in changes.values()]
    assert len({fingerprint(checkpoint), *found}) == len(changes) + 1
    assert fingerprint(dataclasses.replace(checkpoint, provenance={"by": "someone else"})) == fingerprint(checkpoint)


def test_a_file_and_its_contents_have_one_identity(checkpoint, checkpoint_path):
    assert CheckpointSource(checkpoint_path).fingerprint == fingerprint(checkpoint)


def test_a_file_that_is_replaced_before_first_use_is_refused(checkpoint, tmp_path):
    path = tmp_path / "one.safetensors"
    save_checkpoint(path, checkpoint)
    stream = HandsOffStream(path, device="cpu")
    save_checkpoint(tmp_path / "other.safetensors", make_checkpoint(seed=1))
    os.replace(tmp_path / "other.safetensors", path)
    with pytest.raises(CheckpointError, match="has been changed since this stream was built"):
        next(iter(stream))


def rewrite_weights(path, edit):
    """Another file with the same manifest."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def test_edited_weights_are_another_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "one.safetensors"
    save_checkpoint(path, checkpoint)
    state = HandsOffStream(path, device="cpu").state_dict()
    rewrite_weights(path, lambda tensors: tensors["generator.w_avg"].add_(1.0))
    edited = HandsOffStream(path, device="cpu")
    with pytest.raises(ValueError, match="saved with checkpoint="):
        edited.load_state_dict(state)
    with pytest.raises(CheckpointError, match="the weights are not those that were saved"):
        HandsOffStream(path, device="cpu", verify=True)[0]


def test_one_weight_among_many_is_found_when_all_are_verified():
    weights = torch.zeros(100_000)
    manifest = {"heads": {}}
    same = identity(manifest, {"a": weights})
    weights[1] = 1.0
    assert identity(manifest, {"a": weights}) == same, "between the weights that are looked at"
    weights[0] = 1.0
    assert identity(manifest, {"a": weights}) != same


def test_a_checkpoint_in_memory_that_is_edited_after_the_stream_was_built_is_refused(checkpoint):
    mine = copy.deepcopy(checkpoint)
    stream = HandsOffStream(mine, device="cpu")
    mine.generator.w_avg.add_(1.0)
    with pytest.raises(CheckpointError, match="has been changed"):
        stream[0]


def test_streams_of_one_checkpoint_do_not_disturb_each_other_nor_the_checkpoint(checkpoint):
    mine = copy.deepcopy(checkpoint)
    one = HandsOffStream(mine, device="cpu")
    expected = take(HandsOffStream(checkpoint, device="cpu"), 3)
    one[0]
    assert on_device(mine.generator, torch.device("meta")).w_avg.is_meta, "a copy is moved"
    assert {tensor.device.type for tensor in mine.tensors().values()} == {"cpu"}
    mine.generator.w_avg.add_(1.0)  # the stream has what it needs
    assert_same(take(one, 3), expected)
