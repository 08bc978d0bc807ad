"""A graph on a CPU: operators of PyTorch, recorded once and repeated on the same memory, as CUDA repeats kernels.

It keeps what makes graphs dangerous: Python does not run again, whatever it decided stays decided, tensors from outside
are read where they lay, and nothing may be read on the host. A repetition costs as much as the work itself, so the tape
is for tests and dry runs. It keeps the results of all operators, so it is for small networks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.graphs import Run

GARBAGE = 77
"""Fills the memory of results until the first replay: a capture computes nothing."""


class OperatorTape(TorchDispatchMode):
    """Records the operators that run inside its `with` block.

    Raises:
        RuntimeError: an operator gives a value, or a size that depends on values, to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            raise RuntimeError(f"{func} reads values on the host, which a graph cannot repeat")
        result = func(*args, **(kwargs or {}))
        self._steps.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        """Repeat all operators; results lie where those of the recording lay."""
        for func, args, kwargs, before in self._steps:
            if func.is_view:
                continue
            results = tree_leaves(func(*args, **kwargs))
            if not func._schema.is_mutable:
                for target, source in zip(before, results, strict=True):
                    target.copy_(source)


def _waits(func: Any, args: Any) -> bool:
    """Whether the host has to know values to go on; indexing waits for masks only."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func.overloadpacket is torch.ops.aten.index:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def record_on_tape(run: Run, device: torch.device) -> tuple[Callable[[], object], LabelledBatch]:
    """Takes the place of `handsoff_stream.graphs.capture` on a CPU."""
    with OperatorTape() as tape:
        batch = run()

    def spoil(tensor: Tensor) -> Tensor:
        return tensor.fill_(GARBAGE)

    return tape.replay, batch.map(spoil)
