"""What frameworks do with a stream or a loader by themselves, as docs/integrations.md says it."""

from functools import partial

import pytest
from frameworks import launched_as_rank, make_stream, uninterrupted
from processes import run_ranks
from torch.utils.data import default_collate

from handsoff_stream.outlets.loader import HandsOffLoader


def lightning_alone(checkpoint: str, folder: str, options: dict[str, int]) -> list[int]:
    """Indices of two runs, the second from the checkpoint of the first, without a callback of ours."""
    import lightning_resume
    from lightning.pytorch import Trainer

    launched_as_rank()
    seen, path = [], None
    for steps in (2, 5):
        loader = HandsOffLoader(make_stream(checkpoint, batch_size=4, **options))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = Trainer(max_steps=steps, **quiet)
        model = lightning_resume.Segmenter(3)
        trainer.fit(model, loader, ckpt_path=path)
        path = f"{folder}/{steps}.ckpt"
        trainer.save_checkpoint(path)
        seen += model.trained
    return seen


def test_lightning_alone_is_exact_with_epochs_and_loses_a_batch_without(checkpoint_path, tmp_path):
    pytest.importorskip("lightning")
    run = partial(run_ranks, lightning_alone, 1, checkpoint=str(checkpoint_path), folder=str(tmp_path))
    assert run(options={"epoch_size": 40}) == [uninterrupted(checkpoint_path, 20)]
    assert run(options={}) == [[*range(8), *range(12, 24)]]


def as_inputs(seen: list[int], samples: list[dict]) -> dict:
    batch = default_collate(samples)
    seen += batch["index"].tolist()
    return {"pixel_values": batch["image"], "labels": batch["label"], "indices": batch["index"]}


def plain_trainer(checkpoint: str, folder: str) -> list[int]:
    """Indices of two runs of a plain Trainer on dictionaries, the second from the checkpoint of the first."""
    import transformers_trainer
    from transformers import Trainer, TrainingArguments

    launched_as_rank()
    seen = []
    for steps in (2, 5):
        options = {
            "max_steps": steps,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "remove_unused_columns": False,
        }
        args = TrainingArguments(folder, report_to="none", disable_tqdm=True, use_cpu=True, **options)
        model = transformers_trainer.Segmenter(3)
        stream = make_stream(checkpoint, as_dict=True)
        trainer = Trainer(model, args, train_dataset=stream, data_collator=partial(as_inputs, []))
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if steps == 5 else None)
        seen += model.trained
    return seen


def test_a_plain_trainer_on_one_rank_is_exact(checkpoint_path, tmp_path):
    pytest.importorskip("transformers")
    (seen,) = run_ranks(plain_trainer, 1, checkpoint=str(checkpoint_path), folder=str(tmp_path))
    assert seen == uninterrupted(checkpoint_path, 20)
