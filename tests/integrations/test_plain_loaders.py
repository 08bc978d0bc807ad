"""Loaders that know nothing of streams, in frameworks that resume: they go on, or it is said that they do not."""

import itertools
import warnings
from typing import Any

import pytest
from frameworks import launched_as_rank, make_stream, run_on_ranks, uninterrupted
from processes import run_ranks
from torch.utils.data import DataLoader

from handsoff_stream.errors import StreamError
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.position.dealing import EPOCH_STRIDE
from handsoff_stream.shard import Shard

pytestmark = pytest.mark.filterwarnings("default")  # of the frameworks themselves
AGAIN = "samples would be trained on again"


def fit(
    checkpoint: str, folder: str, runs: list[dict[str, Any]], options: dict[str, int], workers: int, context: str | None
) -> list[tuple[list[int], bool]]:
    """Indices of each run of Lightning's Trainer on a plain DataLoader, and whether it was told that samples repeat.

    Every run after the first resumes from the checkpoint of the one before. `set_epoch`: what the user says before it.
    """
    import lightning_resume
    from lightning.pytorch import Trainer

    launched_as_rank()
    found, path = [], None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for number, run in enumerate(runs):
        stream = make_stream(checkpoint, batch_size=4, **options)
        if "set_epoch" in run:
            stream.set_epoch(run.pop("set_epoch"))
        loader = DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context)
        trainer, model = Trainer(**run, **quiet), lightning_resume.Segmenter(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, loader, ckpt_path=path)
        path = f"{folder}/{number}.ckpt"
        trainer.save_checkpoint(path)
        found.append((model.trained, any(AGAIN in str(warning.message) for warning in caught)))
    return found


@pytest.fixture
def lightning_fits(checkpoint_path, tmp_path):
    pytest.importorskip("lightning")

    def fits(*runs: dict[str, Any], workers: int = 0, context: str | None = None, **options: int) -> list[Any]:
        arguments = {"runs": list(runs), "options": options, "workers": workers, "context": context}
        (found,) = run_ranks(fit, 1, checkpoint=str(checkpoint_path), folder=str(tmp_path), **arguments)
        return found

    return fits


def epochs_of(indices: list[int]) -> list[int]:
    return [index // EPOCH_STRIDE for index in indices]


def test_lightning_goes_through_epochs_of_a_plain_loader(lightning_fits, checkpoint_path):
    assert lightning_fits({"max_epochs": 2}, epoch_size=16) == [
        (uninterrupted(checkpoint_path, 32, epoch_size=16), False)
    ]


def test_each_limited_epoch_of_lightning_has_samples_of_its_own(lightning_fits):
    ((seen, told),) = lightning_fits({"max_epochs": 3, "limit_train_batches": 2}, epoch_size=40)
    assert epochs_of(seen) == [0] * 8 + [1] * 8 + [2] * 8 and len(set(seen)) == 24 and not told


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        ({"max_steps": 2}, {"max_steps": 5}, {}),
        ({"max_steps": 2}, {"max_steps": 4}, {"epoch_size": 16}),
        ({"max_epochs": 1}, {"max_epochs": 2}, {"epoch_size": 16}),
        ({"max_steps": 2}, {"max_steps": 5}, {"workers": 1, "context": "spawn"}),
    ],
    ids=["endless", "in the middle of an epoch", "after an epoch", "in a spawned worker"],
)
def test_lightning_is_told_that_a_plain_loader_begins_again(lightning_fits, first, second, options):
    (seen, told), (again, told_again) = lightning_fits(first, second, **options)
    assert (told, told_again) == (False, True)
    assert again[:8] == seen[:8], "what is said is true"


def test_lightning_goes_on_with_a_plain_loader_at_the_epoch_that_is_set(lightning_fits, checkpoint_path):
    (first, _), (second, told) = lightning_fits({"max_epochs": 1}, {"max_epochs": 2, "set_epoch": 1}, epoch_size=16)
    assert first + second == uninterrupted(checkpoint_path, 32, epoch_size=16) and not told


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_epochs_of_lightning_with_the_callback_are_exact_after_the_first_one(checkpoint_path, tmp_path, ranks):
    pytest.importorskip("lightning")
    options = {"batch_size": 4, "epoch_size": 16 * ranks}
    ddp = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    runs = [{"folder": tmp_path, "steps": steps, **ddp} for steps in (4, 8)]
    by_rank = run_on_ranks("lightning_resume", ranks, runs=runs, checkpoint=str(checkpoint_path), options=options)
    seen = [index for runs_of_rank in by_rank for run in runs_of_rank for index in run]
    assert sorted(seen) == uninterrupted(checkpoint_path, 32 * ranks, **options)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_limited_epochs_of_lightning_with_the_callback_repeat_nothing(checkpoint_path, tmp_path, stop):
    pytest.importorskip("lightning")
    options = {"batch_size": 4, "epoch_size": 24}
    runs = [{"folder": tmp_path, "steps": steps, "limit_train_batches": 2} for steps in (stop, 6)]
    ((first, second),) = run_on_ranks(
        "lightning_resume", 1, runs=runs, checkpoint=str(checkpoint_path), options=options
    )
    assert len(first) == 4 * stop and len(second) == 4 * (6 - stop)
    assert len(set(first + second)) == 24
    if stop != 2:
        assert first + second == uninterrupted_by_two(checkpoint_path, 3)


def uninterrupted_by_two(checkpoint: Any, epochs: int) -> list[int]:
    """Two batches of each epoch."""
    stream = make_stream(checkpoint, batch_size=4, epoch_size=24)
    passes = [itertools.islice(stream, 2) for _ in range(epochs)]
    return [int(index) for one in passes for batch in one for index in batch.indices]


# Hugging Face --------------------------------------------------------------------------------------------------------


def trained(checkpoint: str, folder: str, shard: Shard | None, dispatch: bool) -> list[int] | str:
    """What this rank's plain Trainer trains on of a stream of dictionaries, or what was said instead."""
    import torch
    import transformers.trainer
    import transformers_trainer
    from transformers import Trainer, TrainingArguments

    launched_as_rank()
    transformers.trainer.is_datasets_available = lambda: False  # it takes the folder tests/datasets for that package
    config = {"dispatch_batches": dispatch, "split_batches": False}
    args = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, report_to="none", disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, accelerator_config=config, use_cpu=True,
    )  # fmt: skip

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(samples)
        return {"pixel_values": batch["image"], "labels": batch["label"], "indices": batch["index"]}

    model = transformers_trainer.Segmenter(3)
    stream = make_stream(checkpoint, as_dict=True, epoch_size=32, shard=shard)
    try:
        Trainer(model, args, train_dataset=stream, data_collator=collate).train()
    except (StreamError, RuntimeError) as error:
        return str(error)
    return model.trained


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_plain_trainer_on_two_ranks_is_refused_and_with_one_shard_delivers_all(checkpoint_path, tmp_path, dispatch):
    pytest.importorskip("transformers")
    arguments = {"checkpoint": str(checkpoint_path), "folder": str(tmp_path), "dispatch": dispatch}
    one, other = run_ranks(trained, 2, shard=None, **arguments)
    assert "StreamTrainer" in one and isinstance(other, str)
    ranks = run_ranks(trained, 2, shard=Shard(0, 1), **arguments)
    assert sorted(ranks[0] + ranks[1]) == list(range(32)) and len(ranks[0]) == 16


def test_a_handsoff_loader_without_the_callback_is_told_too(checkpoint_path, tmp_path):
    """At the end of an epoch Lightning does not load what it saved of a loader."""
    pytest.importorskip("lightning")
    (told,) = run_ranks(without_callback, 1, checkpoint=str(checkpoint_path), folder=str(tmp_path))
    assert told == [False, True]


def without_callback(checkpoint: str, folder: str) -> list[bool]:
    import lightning_resume
    from lightning.pytorch import Trainer

    launched_as_rank()
    told, path = [], None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for epochs in (1, 2):
        loader = HandsOffLoader(make_stream(checkpoint, batch_size=4, epoch_size=16))
        trainer = Trainer(max_epochs=epochs, **quiet)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(lightning_resume.Segmenter(3), loader, ckpt_path=path)
        path = f"{folder}/{epochs}.ckpt"
        trainer.save_checkpoint(path)
        told.append(any(AGAIN in str(warning.message) for warning in caught))
    return told
