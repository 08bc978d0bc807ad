"""A Lightning callback with which training resumes exactly, on one or several ranks, with or without epochs.

    loader = HandsOffLoader(HandsOffStream("faces", batch_size=8))
    Trainer(callbacks=[StreamPosition(loader)]).fit(module, loader, ckpt_path=path)

Without it Lightning saves the state of rank 0's loader only, and that state is one batch too far if the loader has no
length, since Lightning then fetches a batch ahead. No other module imports lightning.
"""

from typing import Any

from lightning.pytorch import Callback

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.ranks import AllRanks


class StreamPosition(Callback):
    """Saves in each checkpoint the position of every rank's loader after the batch that was trained on last.

    Args:
        loader: the loader that is passed to `fit`; its stream makes batches (`batch_size=n`).
    """

    def __init__(self, loader: HandsOffLoader[LabelledBatch]) -> None:
        self._positions = AllRanks(loader)
        self._trained: LabelledBatch | None = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: LabelledBatch, batch_idx: int
    ) -> None:
        """Remember the batch; called by Lightning."""
        self._trained = batch

    def state_dict(self) -> dict[str, Any]:
        """See `AllRanks.state_dict`; Lightning calls it on every rank."""
        return self._positions.state_dict(after=self._trained)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `AllRanks.load_state_dict`."""
        self._positions.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remove Lightning's own position of the loader, which would be loaded after this one."""
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
