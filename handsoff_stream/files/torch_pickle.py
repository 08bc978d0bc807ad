"""The allow-list for pickles of published generators, with a replacement for each global: storages, tensors, numpy.

Each replacement takes the reader's `Budget` and then the pickled arguments, checks all of them, and returns inert data.
The list, `GLOBALS` at the end, covers everything that the PyTorch StyleGAN code bases write.

Storages are parsed here, including those nested in a pickle: the format is five pickles and raw numbers.
torch.load(weights_only=True) could read them too, but it allocates the claimed sizes before it checks that the bytes
exist, has another allow-list, and once allowed code to run (CVE-2025-32434).

Knows the formats of PyTorch and numpy. Does not know generators.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import Budget
from handsoff_stream.files.strict_pickle import AllowList, Record, check_key, loads, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_DIMENSIONS = 8
SCALAR_BYTES = 64  # approximate memory of one more entry in a dictionary or a set

STORAGE_TYPES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of one or several tensors, as a one-dimensional tensor."""

    data: Tensor


@dataclass(eq=False)
class ElementType:
    """A numpy dtype of numbers or, for object arrays, of references; its byte order is set in a second step."""

    code: str
    order: str = "<"

    def set_pickle_state(self, budget: Budget, state: Any) -> None:
        """Set the byte order from the pickled state of a numpy dtype.

        Raises:
            CheckpointError: a dtype with fields or metadata.
        """
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise CheckpointError("a numpy dtype with fields or metadata, which no published file has")
        self.order = state[1]

    @property
    def numpy(self) -> np.dtype:
        """The numpy dtype."""
        return np.dtype(object) if self.code[0] == "O" else np.dtype(self.order + self.code)


class Array(np.ndarray):
    """A numpy array whose shape and content are set in a second step."""

    def set_pickle_state(self, budget: Budget, state: Any) -> None:
        """Set shape, dtype and content from the pickled state of a numpy array.

        Raises:
            CheckpointError: content of another size or kind, or too much of it.
        """
        _, shape, element_type, fortran, content = state
        dtype = _expect(element_type, ElementType).numpy
        numel = math.prod(_sizes(shape))
        if type(content) is list and dtype.hasobject and len(content) == numel:
            budget.spend(8 * numel)
        elif type(content) is memoryview and not dtype.hasobject and len(content) == numel * dtype.itemsize:
            budget.spend(len(content))
            content = bytes(content)
        else:
            raise CheckpointError(f"a numpy array {list(shape)} of {dtype} whose content is of another size or kind")
        self.__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]


def storage_type(name: Any) -> torch.dtype:
    """`torch.FloatStorage` or another storage class => dtype of its elements.

    Raises:
        CheckpointError: any other name.
    """
    if getattr(name, "module", None) != "torch" or name.name not in STORAGE_TYPES:
        raise CheckpointError("a storage of an unknown type of elements")
    return STORAGE_TYPES[name.name]


def flat_tensor(raw: memoryview, dtype: torch.dtype, budget: Budget) -> Tensor:
    """A copy of little-endian numbers as a one-dimensional tensor.

    Raises:
        CheckpointError: the copy exceeds the budget.
    """
    budget.spend(len(raw))
    if not len(raw):
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def read_legacy(data: memoryview, allowed: AllowList, budget: Budget) -> Any:
    """Read the container of torch.save before PyTorch 1.6, and of all nested storages: five pickles, then raw numbers.

    Raises:
        CheckpointError: as `strict_pickle.loads`, or storages whose numbers are missing or have another size.
    """
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        key, dtype, numel = storage_id(pid)
        if numel * dtype.itemsize > len(data):
            raise CheckpointError(f"claims a storage of {numel} numbers in {len(data)} bytes; copy the file again")
        if key not in storages:
            budget.spend(numel * dtype.itemsize)
            storages[key] = Storage(torch.zeros(numel, dtype=dtype))
        return storages[key]

    position = 0
    head: list[Any] = []
    for _ in range(3):
        value, position = loads(data, {}, budget, start=position)
        head.append(value)
    if head[:2] != [LEGACY_MAGIC, LEGACY_PROTOCOL] or type(head[2]) is not dict or not head[2].get("little_endian"):
        raise CheckpointError("not a little-endian torch.save file of the protocol in use since 2016")
    content, position = loads(data, allowed, budget, start=position, persistent=persistent)
    keys, position = loads(data, {}, budget, start=position)
    if type(keys) is not list or len(keys) != len(storages) or set(map(check_key, keys)) != storages.keys():
        raise CheckpointError("the list of its storages does not match its tensors; copy the file again")
    for key in keys:
        target = storages[key].data
        size = 8 + target.nbytes
        raw = data[position : position + size]
        if len(raw) < size or int.from_bytes(raw[:8], "little") != target.numel():
            raise CheckpointError(f"storage {shown(key)} is truncated or has another size; copy the file again")
        position += size
        budget.memory += target.nbytes  # `persistent` has already counted it
        target.copy_(flat_tensor(raw[8:], target.dtype, budget))
    return content


def storage_id(pid: Any) -> tuple[str, torch.dtype, int]:
    """torch.save's persistent id => (key, dtype, number of elements).

    Raises:
        CheckpointError: any other object than the id of a whole storage.
    """
    if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] != "storage" or (len(pid) == 6 and pid[5]):
        raise CheckpointError(
            "a persistent id that is not of a whole storage; save the file again with a newer PyTorch"
        )
    _, kind, key, _, numel = pid[:5]
    return _expect(key, str), storage_type(kind), _sizes((numel,))[0]


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise CheckpointError(f"a {type(value).__name__} where a {kind.__name__} belongs; the file is damaged")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    sizes: tuple[int, ...] = _expect(values, tuple)
    if len(sizes) > MAX_DIMENSIONS or any(type(v) is not int or not 0 <= v < 2**40 for v in sizes):
        raise CheckpointError("sizes that are not a short tuple of natural numbers; the file is damaged")
    return sizes


def _storage_from_bytes(budget: Budget, data: Any) -> Storage:
    names: AllowList = {("torch", name): None for name in STORAGE_TYPES}
    return _expect(read_legacy(_expect(data, memoryview), names, budget), Storage)


def _tensor(budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    flat = _expect(storage, Storage).data
    size, stride, (offset,) = _sizes(size), _sizes(stride), _sizes((offset,))
    numel = math.prod(size)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A stride of 0 could repeat numbers endlessly, so a tensor may not have more elements than its storage.
    if numel and (end > flat.numel() or numel > flat.numel()):
        raise CheckpointError(
            f"a tensor {list(size)} with strides {list(stride)} at {offset} in a storage of {flat.numel()} numbers; "
            "the file is damaged"
        )
    budget.spend(numel * flat.element_size())
    return flat.as_strided(size, stride, offset) if numel else flat.new_empty(size)


def _parameter(budget: Budget, data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise CheckpointError("a parameter that is not a tensor; the file is damaged")
    return data


def _persistent_object(budget: Budget, meta: Any) -> Record:
    # meta["module_src"] is source code that the published loaders execute; it is ignored here.
    meta = _expect(meta, dict)
    return Record(_expect(meta.get("class_name"), str), _expect(meta.get("state"), dict))


def _dict(budget: Budget, pairs: Any = ()) -> dict[Any, Any]:
    budget.step(len(pairs))
    budget.spend(SCALAR_BYTES * len(pairs))
    return {check_key(key): value for key, value in pairs}


def _set(budget: Budget, members: Any = ()) -> set[Any]:
    budget.step(len(members))
    budget.spend(SCALAR_BYTES * len(members))
    return {check_key(member) for member in members}


def _latin1(budget: Budget, text: Any, encoding: Any) -> memoryview:
    if type(encoding) is not str or encoding not in ("latin1", "latin-1"):
        raise CheckpointError(f"byte strings encoded as {shown(encoding)}; pickles use latin1")
    budget.spend(len(_expect(text, str)))
    return memoryview(text.encode("latin1"))


def _element_type(budget: Budget, code: Any, *_: Any) -> ElementType:
    if type(code) is not str or not re.fullmatch("[fiu][248]|[iub]1|O8|O", code):
        raise CheckpointError(f"a numpy dtype {shown(code)}; numbers of up to 8 bytes are read")
    return ElementType(code)


def _scalar(budget: Budget, element_type: Any, raw: Any) -> float | int | bool:
    dtype = _expect(element_type, ElementType).numpy
    if dtype.hasobject or len(_expect(raw, memoryview)) != dtype.itemsize:
        raise CheckpointError(f"a numpy scalar of {dtype} whose content is of another size")
    return np.frombuffer(raw, dtype)[0].item()


def _empty_array(budget: Budget, *_: Any) -> Array:
    return Array((0,))


GLOBALS: AllowList = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("dnnlib.util", "EasyDict"): _dict,
    ("collections", "OrderedDict"): _dict,
    ("argparse", "Namespace"): lambda budget: Record("argparse.Namespace", {}),
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("_codecs", "encode"): _latin1,
    ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    **{("torch", name): None for name in STORAGE_TYPES},
    ("numpy", "dtype"): _element_type,
    ("numpy", "ndarray"): None,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
}
