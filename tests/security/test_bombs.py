"""Small files that claim or expand to large content are refused, in time and memory proportional to their size.

Each file is made here by a few lines. Time is processor time; memory is the growth of the process's peak.
"""

import json
import struct
import time
import tracemalloc
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from handsoff_stream.checkpoint import load_checkpoint, read_manifest
from handsoff_stream.config import load_class_map
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files import containers
from handsoff_stream.files.budget import MAX_HEADER_BYTES, MAX_LAYERS, MAX_ZIP_ENTRIES
from handsoff_stream.files.containers import parse, read_content
from handsoff_stream.files.strict_pickle import Record
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.generators import load_generator
from handsoff_stream.generators.published import nvlabs, rosinality
from handsoff_stream.label_generator import LabelGenerator

DATA = Path(__file__).parents[1] / "data"
MIB = 2**20


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def refused(read, match: str, *, seconds: float = 1.0, mib: float = 20.0) -> None:
    """A CheckpointError of one printable line within so much time and memory of Python's own."""
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        read()
    took = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    assert took < 5 * seconds and peak < mib, f"{took:.2f} s (traced), {peak:.0f} MiB"  # tracing costs time itself
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300


# Time ------------------------------------------------------------------------------------------------------------


def test_attributes_set_again_and_again_are_counted_by_their_number():
    state = b"}q\x00(" + b"".join(text(f"{i:05d}") + b"N" for i in range(20_000)) + b"u0"
    again = b"cargparse\nNamespace\n)\x81" + 100_000 * b"h\x00b"
    data = b"\x80\x04" + state + again + b"."
    refused(lambda: parse(data), "more instructions and copied entries than real files of \\d+ bytes")


def test_long_equal_keys_are_refused():
    key = "k" * 100_000
    data = b"\x80\x04" + text(key) + b"q\x000" + text(key) + b"q\x010}" + 30_000 * b"h\x00Nsh\x01Ns" + b"."
    refused(lambda: parse(data), "a dictionary key of 100000 characters")


def test_a_mapping_network_of_a_quarter_of_a_million_layers_is_refused_by_its_number():
    layer = Record("FullyConnectedLayer", {"_parameters": {"weight": torch.ones(8, 8)}, "activation": "lrelu"})
    mapping = Record("MappingNetwork", {"_modules": {f"fc{i}": layer for i in range(250_000)}})
    synthesis = Record("SynthesisNetwork", {"_modules": {}})
    network = Record("Generator", {"_modules": {"mapping": mapping, "synthesis": synthesis}, "z_dim": 8})
    synthesis.state["_modules"]["b4"] = Record("SynthesisBlock", {"_modules": {}})
    refused(lambda: nvlabs.build({"G_ema": network}), f"250000 layers in its mapping network; up to {MAX_LAYERS}")


def test_layers_with_very_many_other_parameters_are_looked_up_not_copied():
    crowd = Record("Layer", {"_parameters": {f"p{i}": torch.ones(()) for i in range(20_000)}})
    started = time.process_time()
    for _ in range(10_000):
        assert nvlabs._find(crowd, "p7") is not None
    assert time.process_time() - started < 2


@pytest.mark.parametrize("key", ["to_rgbs.{}.bias", "style.{}.weight"])
def test_a_state_dict_of_very_many_layers_is_refused_by_their_number(key):
    one = torch.ones(1, 3, 1, 1)
    state = {"input.input": one, "to_rgb1.bias": one, **{key.format(i): one for i in range(100_000)}}
    refused(lambda: rosinality.convert(state, None), "resolutions in its state dict|layers in its mapping network")


# Memory ----------------------------------------------------------------------------------------------------------


def test_blocks_that_shift_beyond_all_sizes_are_refused_by_their_number():
    block = Record("SynthesisBlock", {"_modules": {}})
    synthesis = Record("SynthesisNetwork", {"_modules": {f"b{i:05d}": block for i in range(99_999)}})
    network = Record("Generator", {"_modules": {"mapping": synthesis, "synthesis": synthesis}})
    refused(lambda: nvlabs.build({"G_ema": network}), "99999 blocks in its synthesis network")


def test_a_restyle_file_of_very_many_heads_is_refused_by_their_number(tmp_path):
    content = torch.load(DATA / "restyle_psp_tiny.pt", weights_only=True)
    linear = content["state_dict"]["encoder.styles.0.linear.weight"]
    for i in range(3_000):
        content["state_dict"][f"encoder.styles.{i}.linear.weight"] = linear
    content["latent_avg"] = content["latent_avg"].flatten()[:16].clone()
    torch.save(content, tmp_path / "many.pt")
    refused(lambda: load_restyle(tmp_path / "many.pt"), "3000 style inputs")


def test_one_tensor_under_many_names_makes_no_large_network(tmp_path):
    content = torch.load(DATA / "rosinality_32.pt", weights_only=True)
    shared = torch.ones(700, 700)
    state = content["g_ema"]
    for i in range(1, 61):
        state[f"style.{i}.weight"], state[f"style.{i}.bias"] = shared, shared[0]
    for name in [name for name in state if name.endswith("modulation.weight")]:
        state[name] = shared[: len(state[name])] if len(state[name]) <= 700 else state[name]
    content["latent_avg"] = shared[0]
    torch.save(content, tmp_path / "shared.pt")
    refused(lambda: load_generator(tmp_path / "shared.pt"), "many share the same numbers", mib=40)


def test_members_of_a_label_generator_are_compared_before_anything_is_allocated():
    state = {f"layers.{i}.{name}": torch.ones(1) for i in (2, 5) for name in ("weight", "bias")}
    state |= {"layers.0.weight": torch.ones(500_000, 1), "layers.3.weight": torch.ones(1, 1)}
    state |= {"layers.6.weight": torch.ones(1, 1)}
    before = torch.ones(1).untyped_storage().nbytes()
    with pytest.raises(ValueError, match="missing|expected"):
        LabelGenerator.from_published_state_dicts([state], [6080])
    assert before  # 12 GB would not have been there


def test_an_archive_of_very_many_entries_is_refused_before_its_directory_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for i in range(MAX_ZIP_ENTRIES + 5_000):
            archive.writestr(str(i), b"")
    refused(lambda: read_content(tmp_path / "many.pt"), "entries in its zip directory")


def test_a_directory_that_hides_behind_a_comment_is_refused(tmp_path):
    whole = (DATA / "rosinality_32.pt").read_bytes()
    refused(lambda: parse(whole[:-2] + struct.pack("<H", 30) + b"x" * 30), "truncated, or another format")


def test_a_file_of_another_type_is_refused_by_its_first_bytes(tmp_path, monkeypatch):
    """100 GB of zeros on no disk at all: neither read nor mapped."""
    path = tmp_path / "zeros.pkl"
    with path.open("wb") as file:
        file.truncate(100 * 2**30)
    monkeypatch.setattr(containers, "_view", None)
    refused(lambda: read_content(path), "none of safetensors")


def test_a_large_file_is_mapped_not_read(tmp_path):
    """A pickle of one number with 4 GB behind it."""
    path = tmp_path / "long.pkl"
    with path.open("wb") as file:
        file.write(b"\x80\x04K\x07.")
        file.truncate(4 * 2**30)
    tracemalloc.start()
    assert read_content(path).value == 7
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_no_pipe_and_no_device_is_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.pkl")
    for path in (tmp_path / "pipe.pkl", Path("/dev/zero"), tmp_path):
        for read in (read_content, load_generator, load_restyle):
            refused(lambda read=read, path=path: read(path), "no such file")


# Checkpoints of our own format -----------------------------------------------------------------------------------


@pytest.fixture
def rewritten(checkpoint_path, tmp_path):
    def rewrite(change):
        manifest, tensors = read_manifest(checkpoint_path), load_file(checkpoint_path)
        change(manifest, tensors)
        save_file(tensors, tmp_path / "odd.safetensors", metadata={"handsoff_stream": json.dumps(manifest)})
        return tmp_path / "odd.safetensors"

    return rewrite


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(output_size=[200_000, 200_000]), "output_size.0: .*less than or equal to 4096"),
        (lambda m: m.update(crop={"top": 0, "bottom": 10**9, "left": 0, "right": 1}), "crop.bottom"),
        (lambda m: m["heads"]["segmentation"]["label_generator"].update(members=10**6), "members: .*1000"),
        (lambda m: m["heads"]["segmentation"]["label_generator"].update(hidden=[12_000, 8]), "hidden.0"),
        (lambda m: m["heads"]["segmentation"]["label_generator"].update(hidden=[8_000, 8_000]), "do not fit"),
        (lambda m: m["heads"]["segmentation"]["task"].update(class_names=["a"] * 2_000), "class_names"),
        (lambda m: m["heads"]["segmentation"]["task"].update(palette=[[0, 0, 0]] * 2_000), "palette"),
        (lambda m: m["heads"].update({f"h{i}": m["heads"]["segmentation"] for i in range(100)}), "heads: .*64"),
        (lambda m: m["generator"]["config"].update(channels=[1] * 900), "900 channels in its geometry"),
        (lambda m: m["generator"]["config"].update(mapping_layers=8_000), "8000 mapping_layers"),
        (lambda m: m["generator"]["config"].update(constant_size=[4096, 4096]), "4096 pixels per side"),
        (lambda m: m["generator"]["config"].update(w_dim=10**30), "w_dim.*huge number"),
    ],
)
def test_sizes_in_a_manifest_are_bounded(rewritten, change, match):
    path = rewritten(lambda manifest, _: change(manifest))
    refused(lambda: load_checkpoint(path), match)


def test_heads_are_compared_with_the_file_before_they_are_allocated(rewritten):
    """0.5 GB of first layer in the manifest, 20 KB in the file."""

    def change(manifest, _):
        manifest["heads"]["segmentation"]["label_generator"].update(members=500, hidden=[8192, 8192])

    path = rewritten(change)
    before = torch.ones(1)
    refused(lambda: load_checkpoint(path), "do not fit the geometry")
    assert before.sum() == 1


def test_a_header_longer_than_any_honest_one_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{" + b" " * (MAX_HEADER_BYTES + 10))
    refused(lambda: load_checkpoint(path), "claims a safetensors header")
    refused(lambda: load_generator(path), "claims a safetensors header")


# Text ------------------------------------------------------------------------------------------------------------


def yaml_refused(tmp_path, content: str, match: str) -> None:
    (tmp_path / "map.yaml").write_text(content)
    started = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        load_class_map(tmp_path / "map.yaml")
    assert time.process_time() - started < 2
    assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()


def test_yaml_aliases_are_refused(tmp_path):
    doubled = "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
    yaml_refused(tmp_path, f"a0: &a0 [1]\n{doubled}", "line 2: an alias")


@pytest.mark.parametrize(
    "content", ["a: " + "[" * 2_000 + "]" * 2_000, "- " * 2_000 + "1", "{a: " * 500 + "1" + "}" * 500]
)
def test_yaml_nests_so_deep(tmp_path, content):
    yaml_refused(tmp_path, content, "nested more than")


@pytest.mark.parametrize("name", ["y_deep", "y_boolbad", "y_emptyint"])
def test_yaml_that_ended_in_a_traceback_is_refused(tmp_path, name):
    yaml_refused(tmp_path, (DATA / "hostile" / f"{name}.yaml").read_text(), "line \\d|nested")


@pytest.mark.parametrize(
    "content", ["!!timestamp x", "!!int ''", "!!float 'x'", "!!binary '*'", "!!python/name:os.system ''"]
)
def test_yaml_tags_are_refused(tmp_path, content):
    yaml_refused(tmp_path, f"classes:\n  0: {{name: {content}}}", "line 2: a tag")


def test_a_yaml_file_of_many_megabytes_is_refused_unread(tmp_path):
    yaml_refused(tmp_path, "#" * 5 * MIB, "bytes")


def test_an_average_latent_of_the_wrong_kind_is_refused(tmp_path):
    np.save(tmp_path / "w.npy", np.full(28, np.nan, np.float32))
    with pytest.raises(CheckpointError, match="28 finite numbers"):
        load_generator(DATA / "rosinality_32.pt", average_latent=tmp_path / "w.npy")


def test_arguments_of_a_training_are_read_and_ignored(tmp_path):
    torch.save({"args": Namespace(size=8), "g_ema": {}}, tmp_path / "a.pt")
    assert type(read_content(tmp_path / "a.pt").value["args"]) is Record
