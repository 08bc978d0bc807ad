"""Whether a framework divides among ranks what the stream has divided already.

Accelerate's `prepare`, and with it Hugging Face's Trainer, puts an iterable dataset into a shard that hands each rank
its part of what the dataset yields, or lets rank 0 alone iterate. A stream that yields its rank's part by itself would
lose the rest without a word. Who iterates or pickles it can be seen on the call stack, also in forked workers. Knows
names of modules and classes. Does not know streams.
"""

import sys

from handsoff_stream.errors import StreamError

DIVIDERS = {
    ("accelerate.data_loader", "DataLoaderDispatcher"),
    ("accelerate.data_loader", "IterableDatasetShard"),
    ("transformers.trainer_pt_utils", "IterableDatasetShard"),
}


def check_not_divided_again(ranks: int) -> None:
    """Refuse to be iterated or pickled by what divides samples among `ranks` ranks a second time.

    Raises:
        StreamError: with the loader to use instead.
    """
    frame = sys._getframe(1) if ranks > 1 else None
    while frame is not None:
        found = frame.f_globals.get("__name__"), type(frame.f_locals.get("self")).__name__
        if found in DIVIDERS:
            raise StreamError(
                f"Accelerate's {found[1]} divides the samples among {ranks} ranks, and this stream has already done "
                "so, so most of them would be lost; iterate HandsOffLoader(stream), which needs no "
                "`accelerator.prepare` (with the Trainer: StreamTrainer), or pass shard=Shard(0, 1) to let Accelerate "
                "divide the samples"
            )
        frame = frame.f_back
