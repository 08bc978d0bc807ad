"""What frameworks do with a stream or a loader by themselves, as docs/integrations.md says it."""

from functools import partial

import pytest
from frameworks import launched_as_rank, make_stream, uninterrupted
from processes import run_ranks

from handsoff_stream.outlets.loader import HandsOffLoader

pytestmark = pytest.mark.filterwarnings("default")  # of the frameworks themselves


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
