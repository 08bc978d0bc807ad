"""The position of every rank in one state, for frameworks that write one checkpoint for all ranks.

    accelerator.register_for_checkpointing(AllRanks(loader))

Knows loaders, states and torch.distributed. Does not know frameworks.
"""

from typing import Any

import torch.distributed

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.position.state import State, merge_states


class AllRanks:
    """`state_dict` and `load_state_dict` of a loader, for all ranks together.

    With the same number of ranks, each rank continues exactly where it was. With another number, `merge_states` divides
    the remaining samples among the ranks.

    Args:
        loader: of this rank.
    """

    def __init__(self, loader: HandsOffLoader[Any]) -> None:
        self.loader = loader

    def state_dict(self, *, after: LabelledBatch | None = None) -> dict[str, Any]:
        """The states of all ranks in their order, JSON-able. This is a collective operation: call it on every rank.

        Args:
            after: see `HandsOffLoader.state_dict`.
        """
        rank, count = _rank_and_count()
        states: list[Any] = [None] * count
        states[rank] = self.loader.state_dict(after=after)
        if count > 1:
            torch.distributed.all_gather_object(states, states[rank])
        return {"ranks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass of this rank continue where `state_dict` was taken.

        Raises:
            ValueError: the states belong to a stream with other options, or are not those of all ranks of a run.
        """
        rank, count = _rank_and_count()
        states: list[State] = state["ranks"]
        self.loader.load_state_dict(states[rank] if len(states) == count else merge_states(states))


def _rank_and_count() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
