"""The strict reader returns the content of valid files, and refuses other bytes quickly, with little memory.

Pickles are written here by the standard pickler or by hand, opcode by opcode; the standard unpickler reads none.
"""

import io
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import FEW_OPERATIONS, MAX_NESTING
from handsoff_stream.files.containers import parse, read_content
from handsoff_stream.files.strict_pickle import Record

DATA = Path(__file__).parents[1] / "data"
MIB = 2**20

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(-99, 99), inner, max_size=4)
        | st.sets(st.text(max_size=3) | st.integers(0, 9), max_size=4)
    ),
    max_leaves=12,
)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def small(value: int) -> bytes:
    return b"K" + bytes([value])


def integer(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def hand_made(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def refused(data: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        parse(data)


@given(plain, st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_plain_data_of_every_protocol_comes_back(value, protocol):
    assert parse(pickle.dumps(value, protocol)).value == value


def test_older_protocols_and_trailing_garbage():
    refused(pickle.dumps({"a": 1}, 0), "none of safetensors, PyTorch file, pickle")
    refused(b"\x80\x01}.", "pickle protocol 1; protocols 2 to 5 are read")
    refused(b"", "none of safetensors")
    refused(b"\x80", "damaged|beyond its end")


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_save_files_come_back_with_types_views_and_strides(tmp_path, legacy):
    base = torch.arange(24.0)
    content = OrderedDict(
        whole=base,
        view=base[3:15].reshape(3, 4).t(),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        scalar=torch.tensor(7),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        **{str(t): torch.tensor([0, 1, 3]).to(t) for t in (torch.float16, torch.bfloat16, torch.uint8, torch.bool)},
        args=Namespace(size=256, arch="stylegan2"),
    )
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
    value = read_content(tmp_path / "file").value
    args = value.pop("args")
    assert type(args) is Record and args.state == {"size": 256, "arch": "stylegan2"}
    content.pop("args")
    assert list(value) == list(content)
    for name, tensor in content.items():
        assert value[name].dtype == tensor.dtype and value[name].stride() == tensor.stride()
        assert torch.equal(value[name], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_numbers_and_arrays_come_back(protocol):
    values = {
        "gain": np.float64(1.5),
        "count": np.int32(-7),
        "flag": np.bool_(True),
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
        "big endian": np.arange(3, dtype=">i4"),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    if protocol == 5:  # arrays then need names that no published file has
        values = {name: value for name, value in values.items() if value.ndim == 0}
    got = parse(pickle.dumps(values, protocol)).value
    assert got.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(got[name], value), name


def test_an_array_of_objects_comes_back_as_the_restyle_encoders_write_it():
    found = read_content(DATA / "label_generator" / "restyle_latents.npy").value
    assert found.shape == ()
    by_name = found.item()
    assert len(by_name) == 3
    for latents in by_name.values():
        assert [(latent.shape, latent.dtype) for latent in latents] == [((8, 28), np.float32)] * 2


def test_arrays_of_numbers_come_back(tmp_path):
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), np.float16)), np.float32(3)):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_content(tmp_path / "a.npy").value, array)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.pkl: no such file"):
        read_content(tmp_path / "nothing.pkl")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.serialization", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy", "memmap"),
    ],
)
def test_every_other_global_is_blocked_by_exact_name_even_if_it_is_never_called(module, name):
    refused(hand_made(f"c{module}\n{name}\n".encode()), f"blocked global '{module}.{name}'")
    refused(hand_made(text(module), text(name), b"\x93"), f"blocked global '{module}.{name}'")


def test_names_that_may_be_mentioned_may_not_be_called():
    refused(hand_made(called("torch", "FloatStorage", small(9))), "calls torch.FloatStorage, which no readable")
    refused(hand_made(called("numpy", "ndarray", small(9))), "calls numpy.ndarray")
    refused(hand_made(text("system"), b"(tR"), "calls a str")


def test_a_control_character_or_an_endless_name_does_not_reach_the_terminal():
    with pytest.raises(CheckpointError) as caught:
        parse(hand_made(text("\x1b[31m" + "a" * 10_000), text("b"), b"\x93"))
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 400
    refused(hand_made(b"c" + b"a" * 10_000), "damaged")


def test_tensorflow_pickles_are_refused_with_the_way_to_convert_them():
    refused(hand_made(b"cdnnlib.tflib.network\nNetwork\n"), "legacy.py .* of NVlabs/stylegan2-ada-pytorch")


@pytest.mark.parametrize("code", [b"i", b"o", b"\x82\x01", b"\x92", b"2", b"\x96", b"\x97", b"P", b"V", b"L", b"I"])
def test_instructions_that_no_published_file_uses_are_refused(code):
    refused(hand_made(b"}", code), "instruction")


@pytest.mark.parametrize(
    "claim",
    [
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
        b"B\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"J\x00",
    ],
)
def test_lengths_beyond_the_file_are_refused_before_anything_is_allocated(claim):
    refused(hand_made(claim), "claims|integer of")


def test_a_giant_frame_and_a_giant_memo_index_cost_nothing():
    assert parse(hand_made(b"\x95" + b"\xff" * 8, small(3))).value == 3
    assert parse(hand_made(small(3), b"r\xff\xff\xff\xff0", b"j\xff\xff\xff\xff")).value == 3


def test_doubling_structures_are_not_unfolded():
    doubled = b"(t" + 60 * b"q\x00h\x00\x86"
    assert type(parse(hand_made(doubled)).value) is tuple
    refused(hand_made(b"(t" + 200 * b"q\x00h\x00\x86"), "nested more than")
    refused(hand_made(b"}", doubled, b"Ns"), "a tuple as a dictionary key")
    refused(hand_made(b"\x8f(", doubled, b"\x90"), "a tuple as a dictionary key")


def test_doubling_structures_are_not_printed():
    doubled = b"(t" + 60 * b"q\x00h\x00\x86"
    refused(hand_made(doubled, doubled, b"\x93"), "blocked global '<tuple>.<tuple>'")
    refused(hand_made(called("_codecs", "encode", text("a"), doubled)), "encoded as <tuple>")
    refused(hand_made(called("numpy", "dtype", doubled)), "dtype <tuple>")
    refused(hand_made(b"cargparse\nNamespace\n)\x81", doubled, b"b"), "sets attributes of a Record")
    record = parse(hand_made(b"cargparse\nNamespace\n)\x81}", text("a"), doubled, b"sb")).value
    assert len(repr(record)) < 200


NAMESPACE = b"cargparse\nNamespace\n)\x81}" + text("a")


def test_containers_nest_so_deep_and_not_inside_themselves():
    for opened, closed in ((b"]", b"a"), (NAMESPACE, b"sb"), (b"}" + text("a"), b"s")):
        assert parse(hand_made((MAX_NESTING - 1) * opened, b"]", (MAX_NESTING - 1) * closed)).value
        for depth in (MAX_NESTING, 3_000):
            refused(hand_made(depth * opened, b"]", depth * closed), "containers nested more than 64 deep")
    outside_in = b"]q\x00" + 200 * b"]q\x01ah\x01" + 201 * b"0" + b"h\x00"
    refused(hand_made(outside_in), "nested more than")
    refused(hand_made(b"]q\x00h\x00a"), "inside themselves")


def test_a_container_that_many_refer_to_is_walked_once():
    shared = b"]q\x00(" + 500 * small(1) + b"e0"
    assert len(parse(hand_made(shared, b"(", 2_000 * b"h\x00", b"t")).value) == 2_000
    deep = (MAX_NESTING - 2) * b"]" + (MAX_NESTING - 3) * b"a" + b"q\x00"
    assert parse(hand_made(deep, b"h\x00\x86")).value
    refused(hand_made(deep, b"h\x00]]h\x00aa\x87"), "nested more than")  # the same one, seen first where it fits


def test_integers_made_to_collide_are_no_keys():
    refused(hand_made(b"}", integer(2**61 - 1), b"Ns"), "a int as a dictionary key")


def test_more_instructions_than_the_size_of_the_file_allows_are_refused():
    refused(hand_made(FEW_OPERATIONS * b"N0"), "more instructions and copied entries")
    assert parse(hand_made(FEW_OPERATIONS // 4 * b"N0", b"N")).value is None


@pytest.mark.parametrize(
    "copy",
    [
        called("_codecs", "encode", b"h\x00", text("latin1")),
        called("builtins", "set", b"h\x01"),
        called("collections", "OrderedDict", b"h\x02"),
        called("torch._utils", "_rebuild_tensor", b"h\x03", small(0), b"M\x00\x40\x85", b"K\x01\x85"),
    ],
)
def test_copies_of_one_large_thing_add_up_to_a_refusal(copy):
    large = (
        text("a" * 2**16) + b"q\x000",
        b"](" + b"".join(small(i % 256) for i in range(2**14)) + b"eq\x010",
        b"](" + 2**13 * (text("a") + b"N\x86") + b"eq\x020",
        loaded(nested_storage(2**14, raw=bytes(2**16))) + b"q\x030",
    )
    assert parse(hand_made(*large, copy)).value is not None
    refused(
        hand_made(*large, b"(", 2_000 * copy, b"t"), "would take more than 4 times|more instructions and copied entries"
    )


def nested_storage(
    numel: int, key: bytes = text("0"), kind: bytes = b"ctorch\nFloatStorage\n", raw: bytes = b""
) -> bytes:
    """What `_load_from_bytes` is given: five pickles and the numbers."""
    head = torch_head()
    pid = hand_made(b"(", text("storage"), kind, key, text("cpu"), integer(numel), b"NtQ")
    return head + pid + hand_made(b"](", key, b"e") + numel.to_bytes(8, "little", signed=True) + raw


def torch_head() -> bytes:
    values = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    return b"".join(pickle.dumps(value, 2) for value in values)


def loaded(raw: bytes) -> bytes:
    return called("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def tensor_of(storage: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def sizes(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    return hand_made(called("torch._utils", "_rebuild_tensor_v2", storage, integer(offset), sizes(size), sizes(stride)))


FOUR = loaded(nested_storage(4, raw=struct.pack("<4f", 0, 1, 2, 3)))


def test_a_nested_storage_is_read_by_hand():
    assert parse(tensor_of(FOUR, 1, (3,), (1,))).value.tolist() == [1, 2, 3]
    assert parse(tensor_of(FOUR, 0, (2, 2), (1, 2))).value.tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (3, 1)),
        (0, (2**39, 2**39), (0, 0)),
        (0, (5,), (0,)),
        (0, (2,), (2**62,)),
        (0, (2, 2), (1,)),
        (0, (1,) * 9, (1,) * 9),
    ],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(offset, size, stride):
    refused(tensor_of(FOUR, offset, size, stride), "the file is damaged|damaged pickle")


@pytest.mark.parametrize(
    "raw",
    [
        nested_storage(2**38),
        nested_storage(-4),
        nested_storage(4, raw=b"\x00" * 15),
        nested_storage(4, kind=b"ctorch\nnn\n", raw=b"\x00" * 16),
        nested_storage(4, kind=text("FloatStorage"), raw=b"\x00" * 16),
        nested_storage(4, key=small(3), raw=b"\x00" * 16),
        torch_head() + hand_made(called("torch.storage", "_load_from_bytes", b"C\x00")),
        torch_head() + hand_made(b"N") + hand_made(b"]"),
        b"\x80\x02N.",
        b"",
    ],
)
def test_storages_that_lie_are_refused(raw):
    with pytest.raises(CheckpointError):
        parse(tensor_of(loaded(raw), 0, (1,), (1,)))


def rezipped(change, compression=zipfile.ZIP_STORED) -> bytes:
    """rosinality_32.pt with each member's bytes given by `change(name, bytes)`, None to leave it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(DATA / "rosinality_32.pt") as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return out.getvalue()


def test_zip_archives_that_lie_are_refused():
    assert parse(rezipped(lambda name, raw: raw)).value
    refused(rezipped(lambda name, raw: raw, zipfile.ZIP_DEFLATED), "is compressed, which torch.save never does")
    refused(rezipped(lambda name, raw: None if name.endswith("data.pkl") else raw), "it needs one data.pkl")
    refused(rezipped(lambda name, raw: None if name.endswith("data/7") else raw), "data/7")
    refused(rezipped(lambda name, raw: raw[:-4] if name.endswith("data/7") else raw), "storage 7 has")
    whole = rezipped(lambda name, raw: raw)
    refused(whole[: len(whole) // 2], "truncated, or another format")
    position = whole.rindex(b"PK\x01\x02")
    lying = bytearray(whole)
    lying[position + 20 : position + 28] = struct.pack("<II", 2**31, 2**31)
    with pytest.raises(CheckpointError):
        parse(bytes(lying).replace(b"data/81", b"data/80"))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }",
        "{'descr': '|V999999999', 'fortran_order': False, 'shape': (), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 4, }",
        "__import__('os').system('true')",
        "(" * 5_000,
    ],
)
def test_array_headers_that_lie_are_refused(header):
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with pytest.raises(CheckpointError):
        parse(raw + b"\x00" * 4)
