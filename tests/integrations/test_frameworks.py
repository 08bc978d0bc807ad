"""Lightning, Accelerate and Hugging Face's Trainer, by the scripts of examples/integrations: nothing lost or twice."""

import pytest
from frameworks import run_on_ranks, uninterrupted

pytestmark = pytest.mark.filterwarnings("default")  # of the frameworks themselves
ENDLESS: dict[str, int] = {}
SIZED = {"epoch_size": 24}  # per rank: runs of the Trainers go on into the next epoch


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", [ENDLESS, SIZED], ids=["endless", "sized"])
@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_resume", "transformers_trainer"])
def test_an_interrupted_run_trains_on_what_an_uninterrupted_one_does(name, options, ranks, checkpoint_path, tmp_path):
    pytest.importorskip(name.partition("_")[0])
    options = {"batch_size": 4} | {key: size * ranks for key, size in options.items()}
    steps = [2, 3] if name == "accelerate_loop" else [2, 8]  # so many more, or until so many
    ddp = {"strategy": "ddp", "devices": ranks} if ranks > 1 and name == "lightning_resume" else {}
    runs = [{"folder": tmp_path, "steps": n, **ddp} for n in steps]
    by_rank = run_on_ranks(name, ranks, runs=runs, checkpoint=str(checkpoint_path), options=options)
    second = 12 if name == "accelerate_loop" else 24
    assert [[len(run) for run in runs_of_rank] for runs_of_rank in by_rank] == [[8, second]] * ranks
    seen = [index for runs_of_rank in by_rank for run in runs_of_rank for index in run]
    assert sorted(seen) == uninterrupted(checkpoint_path, (8 + second) * ranks, **options)
