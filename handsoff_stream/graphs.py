"""A synthesizer whose work on the device is captured once as a CUDA graph and then replayed with one launch per chunk.

    latents and noise maps of a chunk => copied into static memory => replay => results copied out of static memory

A chunk takes hundreds of kernel launches, which the host makes one by one; where the kernels are short, the device
waits for the host. A graph is captured for each shape of the inputs, which is the shape of a chunk. Its kernels are
those of the synthesizer, so its samples have the same bits.

A graph remembers addresses, not tensors. So everything that the synthesizer reads is kept alive, tables that are cached
elsewhere included, and work that reads a tensor made on the host at each call is refused: its values would be those of
the capture forever.

**Nothing here has run on a GPU yet.** On a CPU, the tests replace `capture` by a tape that records operators and
repeats them on the same memory. Knows memory and replays. Does not know what is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.synthesizer import Synthesizer

MAX_SHAPES = 4
"""Graphs that are kept; each holds the memory of a whole pass. A chunk of a further shape is computed without one."""

Run = Callable[[], LabelledBatch]
Capture = Callable[[Run, torch.device], tuple[Callable[[], object], LabelledBatch]]
"""Records the work of a function; returns what repeats it, and the batch whose memory each repetition writes."""


def check_graphs(graphs: bool, device: torch.device) -> None:
    """Raises ValueError if graphs are wanted on a device that has none."""
    if graphs and device.type != "cuda":
        raise ValueError(f'graphs=True captures CUDA graphs, but the device is "{device}"; leave it out, or pass a GPU')


def capture(run: Run, device: torch.device) -> tuple[Callable[[], object], LabelledBatch]:
    """Capture the kernels of `run` on a CUDA device, which waits for all its work before."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads of a training process, such as those that pin memory, may use CUDA meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        batch = run()
    return graph.replay, batch


class GraphedSynthesizer:
    """Gives the batches of a synthesizer, packed (see `LabelledBatch.packed`), by replaying graphs.

    The first chunk of each shape is computed three times and captured, so it takes longer. Results are copies, so
    they stay as they are while later chunks are computed.

    Args:
        synthesizer: whose samples these are; its weights must not be replaced afterwards.
        capture: records work on the synthesizer's device.
    """

    def __init__(self, synthesizer: Synthesizer, capture: Capture = capture):
        self._synthesizer = synthesizer
        self._capture = capture
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}

    @torch.inference_mode(False)  # static memory is written again outside of the consumer's inference mode
    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> LabelledBatch:
        """Synthesize and label the samples of these indices; tensors lie on the synthesizer's device.

        Raises:
            RuntimeError: the work cannot be captured.
        """
        inputs = self._synthesizer.inputs(indices)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._captured:
            if len(self._captured) == MAX_SHAPES:
                return self._synthesizer(indices).packed()
            self._captured[shapes] = self._record(inputs)
        batch = self._captured[shapes].replay_with(inputs)
        return replace(batch, indices=torch.tensor(indices, dtype=torch.int64), next_index=indices[-1] + 1)

    def _record(self, inputs: Sequence[Tensor]) -> "_Captured":
        static = tuple(tensor.clone() for tensor in inputs)
        no_indices = torch.empty(0, dtype=torch.int64)

        def run() -> LabelledBatch:
            images, labels, uncertainty = self._synthesizer.compute(*static)
            return LabelledBatch(images, labels, uncertainty, no_indices, 0).packed()

        run()  # libraries load their kernels and plans, and tables are cached
        known = tensors_read(run)
        fresh = [tensor for tensor in tensors_read(run) if not any(tensor is other for other in known)]
        if fresh:
            raise RuntimeError(
                f"the synthesis reads {len(fresh)} tensors that are made on the host at each call, the first of shape "
                f"{list(fresh[0].shape)}: replays would repeat the values of the capture; pass graphs=False"
            )
        try:
            replay, batch = self._capture(run, self._synthesizer.device)
        except Exception as error:
            error.add_note("while the synthesis was being captured as a graph; graphs=False does without")
            raise
        return _Captured(static, batch, replay, known)


@dataclass(frozen=True)
class _Captured:
    """The work on one shape of inputs."""

    inputs: tuple[Tensor, ...]
    batch: LabelledBatch
    replay: Callable[[], object]
    kept_alive: list[Tensor]
    """What the graph reads at fixed addresses."""

    def replay_with(self, inputs: Sequence[Tensor]) -> LabelledBatch:
        """The results for these inputs, in memory of their own."""
        for target, source in zip(self.inputs, inputs, strict=True):
            target.copy_(source)
        self.replay()
        return self.batch.map(torch.clone)


def tensors_read(run: Callable[[], object]) -> list[Tensor]:
    """The tensors that the operators of `run` take but none of them made, such as weights and cached tables."""
    with _Reads() as reads:
        run()
    return reads.found


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor not in self._seen:
                self._seen[tensor] = None
                self.found.append(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._seen[tensor] = None
        return result
