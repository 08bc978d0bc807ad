"""torchdata: StatefulDataLoader and nodes save and resume the position of a stream.

python examples/integrations/torchdata_loaders.py
"""

import gc
import json
import threading
from typing import Any, Literal

from torchdata.nodes import IterableWrapper, Loader, Prefetcher
from torchdata.stateful_dataloader import StatefulDataLoader

from handsoff_stream import HandsOffStream, LabelledBatch

Kind = Literal["loader", "nodes"]


def make_loader(stream: HandsOffStream[LabelledBatch], kind: Kind, workers: int = 0) -> Any:
    """A loader with `state_dict` and `load_state_dict`."""
    if kind == "loader":
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)
    return Loader(Prefetcher(IterableWrapper(stream), prefetch_factor=2))


def train(
    stream: HandsOffStream[LabelledBatch], kind: Kind, steps: int, saved: str | None = None, workers: int = 0
) -> tuple[list[int], str]:
    """Train for `steps`, from a saved position if there is one; the indices of the samples seen, and the position."""
    loader = make_loader(stream, kind, workers)
    if saved is not None:
        loader.load_state_dict(json.loads(saved))
    trained: list[int] = []
    for _, batch in zip(range(steps), loader, strict=False):
        trained += batch.indices.tolist()
    return trained, json.dumps(loader.state_dict())


def end_prefetchers() -> None:
    """Wait for the threads of prefetchers: one that is inside PyTorch when the interpreter exits would abort it."""
    gc.collect()  # tells the threads of loaders that nothing refers to any more to end after the item they are at
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()


if __name__ == "__main__":
    kinds: tuple[Kind, ...] = ("loader", "nodes")
    for kind in kinds:
        trained, saved = train(HandsOffStream("faces", batch_size=4), kind, steps=2)
        rest, _ = train(HandsOffStream("faces", batch_size=4), kind, steps=2, saved=saved)
        print(kind, trained, rest)
    end_prefetchers()
