"""At full rate: whether each index was handed out once or dropped by the filter, in order."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.soak.windows import Windows
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.stream import HandsOffStream


class Ledger:
    """Whether each index was handed out once or dropped by the filter, in order, over one pass of one process."""

    def __init__(self) -> None:
        self.pairs, self._next = 0, 0
        self.out_of_order = 0
        """Indices that came twice or too late."""
        self.unaccounted = 0
        """Indices that were neither handed out nor dropped, or both."""

    def add(self, batch: LabelledBatch, counts: dict[str, int]) -> None:
        """A batch, and what the stream counted up to it."""
        indices = batch.indices.tolist()
        steps = itertools.pairwise([self._next - 1, *indices])
        self.out_of_order += sum(later <= earlier for earlier, later in steps)
        self.pairs += len(indices)
        self._next = indices[-1] + 1
        dropped = batch.next_index - self.pairs
        self.unaccounted = max(
            self.unaccounted, abs(counts["rejected"] - dropped), abs(counts["accepted"] - self.pairs)
        )


def run_rate(
    stream: HandsOffStream[LabelledBatch], *, seconds: float, window_seconds: float
) -> Iterator[dict[str, Any]]:
    """The result after each window, until so many seconds have passed."""
    windows, ledger, opened = Windows(of_seconds=window_seconds), Ledger(), time.perf_counter()
    for batch in stream:
        ledger.add(batch, {"accepted": stream.accepted, "rejected": stream.rejected})
        if windows.update(ledger.pairs):
            finished = time.perf_counter() - opened >= seconds
            kept = {"out_of_order": ledger.out_of_order, "unaccounted": ledger.unaccounted}
            yield {"finished": finished, **kept, "rejected": stream.rejected, **windows.summary()}
            if finished:
                return
