"""Hugging Face's Trainer on a stream: each rank synthesizes its own batches, and checkpoints hold all positions.

    trainer = StreamTrainer(model, args, loader=loader, inputs=lambda b: {"pixel_values": b.images, "labels": b.labels})
    trainer.train(resume_from_checkpoint=True)

A plain Trainer passes its dataset to Accelerate, which would shard the stream a second time. To resume, it repeats the
epoch from its beginning. No other module imports transformers.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.errors import StreamError
from handsoff_stream.files.atomic import whole_file
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.ranks import AllRanks

STATE_FILE = "stream.json"
Inputs = Callable[[LabelledBatch], dict[str, Any]]


class StreamTrainer(Trainer):
    """A Trainer that trains on a loader's batches, and resumes exactly.

    With `epoch_size`, an epoch of the stream is an epoch of the Trainer; an endless stream needs `max_steps`. The batch
    size is the stream's; `per_device_train_batch_size` only changes the numbers that the Trainer reports.

    Args:
        *args: of `transformers.Trainer`.
        **options: of `transformers.Trainer`, by name.
        loader: of this rank; its stream makes batches (`batch_size=n`).
        inputs: batch => keyword arguments of the model.
    """

    def __init__(self, *args: Any, loader: HandsOffLoader[LabelledBatch], inputs: Inputs, **options: Any) -> None:
        super().__init__(*args, **options)
        self.args.ignore_data_skip = True  # the loader resumes by itself
        self._batches = _Batches(loader, inputs)
        self._positions = AllRanks(loader)
        self.add_callback(_SavePositions(self._positions))

    def get_train_dataloader(self) -> Any:
        """The loader's batches as keyword arguments of the model; they are not sharded again."""
        return self._batches

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """See `transformers.Trainer.train`.

        Raises:
            StreamError: the checkpoint contains no position of the stream.
            ValueError: the position belongs to a stream with other options.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self._positions.load_state_dict(_read(Path(folder) / STATE_FILE))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)


class _Batches:
    """The batches of a loader, as keyword arguments of a model."""

    def __init__(self, loader: HandsOffLoader[LabelledBatch], inputs: Inputs) -> None:
        self._loader, self._inputs = loader, inputs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._inputs, self._loader)

    def __len__(self) -> int:
        return len(self._loader)


class _SavePositions(TrainerCallback):
    """Writes the positions of all ranks into every checkpoint."""

    def __init__(self, positions: AllRanks) -> None:
        self._positions = positions

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        positions = self._positions.state_dict()  # on every rank
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with whole_file(folder / STATE_FILE) as path:
                path.write_text(json.dumps(positions))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise StreamError(
            f"{path} cannot be read ({error}), so the position of the stream is unknown and samples would be repeated; "
            "resume from a checkpoint that StreamTrainer wrote, or start a new run with another seed"
        ) from error
