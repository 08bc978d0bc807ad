"""Loaders that Accelerate prepares: on several ranks it divides the samples itself, so the stream must not, too."""

import itertools

import pytest
from frameworks import launched_as_rank, make_stream, uninterrupted
from processes import run_ranks
from torch.utils.data import DataLoader

from handsoff_stream.errors import StreamError
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.shard import Shard

pytestmark = pytest.mark.filterwarnings("default")  # of the frameworks themselves
accelerate = pytest.importorskip("accelerate")


def accelerator(**options):
    launched_as_rank()
    return accelerate.Accelerator(dataloader_config=accelerate.DataLoaderConfiguration(**options))


def prepared(
    checkpoint: str, dispatch: bool, shard: Shard | None, workers: int, context: str | None
) -> list[int] | str:
    """Indices seen by this rank, or what was said instead."""
    stream = make_stream(checkpoint, as_dict=True, epoch_size=32, shard=shard)
    loader = DataLoader(stream, batch_size=4, num_workers=workers, multiprocessing_context=context)
    try:
        batches = list(accelerator(dispatch_batches=dispatch).prepare(loader))
    except (StreamError, RuntimeError) as error:
        return str(error)
    return [int(index) for batch in batches for index in batch["index"]]


@pytest.mark.parametrize(
    ("dispatch", "workers", "context"),
    [(True, 0, None), (False, 0, None), (True, 1, "fork"), (False, 1, "fork"), (True, 1, "spawn")],
)
def test_a_loader_that_is_divided_twice_is_refused(checkpoint_path, dispatch, workers, context):
    arguments = {"dispatch": dispatch, "shard": None, "workers": workers, "context": context}
    one, other = run_ranks(prepared, 2, checkpoint=str(checkpoint_path), **arguments)
    assert "iterate HandsOffLoader(stream)" in one
    assert isinstance(other, str)  # with dispatch, rank 1 waits for rank 0, which has ended


@pytest.mark.parametrize("dispatch", [True, False])
def test_accelerate_alone_may_divide(checkpoint_path, dispatch):
    arguments = {"dispatch": dispatch, "shard": Shard(0, 1), "workers": 0, "context": None}
    ranks = run_ranks(prepared, 2, checkpoint=str(checkpoint_path), **arguments)
    assert sorted(ranks[0] + ranks[1]) == list(range(32)) and len(ranks[0]) == 16


def stateful(checkpoint: str, folder: str, steps: list[int]) -> list[list[int]]:
    """Accelerate's own way on one process: a prepared loader, save_state after some batches, load_state, the rest."""
    seen = []
    for number, count in enumerate(steps):
        here = accelerator(use_stateful_dataloader=True)
        loader = here.prepare(DataLoader(make_stream(checkpoint, as_dict=True), batch_size=4))
        if number:
            here.load_state(folder)
        batches = list(itertools.islice(loader, count))
        seen.append([int(index) for batch in batches for index in batch["index"]])
        here.save_state(folder)
    return seen


def test_a_stateful_loader_goes_on_after_load_state(checkpoint_path, tmp_path):
    (runs,) = run_ranks(stateful, 1, checkpoint=str(checkpoint_path), folder=str(tmp_path), steps=[3, 2, 4])
    assert sum(runs, []) == uninterrupted(checkpoint_path, 36, batch_size=4)


def untouched(checkpoint: str) -> bool:
    loader = HandsOffLoader(make_stream(checkpoint, batch_size=4))
    return accelerator().prepare(loader) is loader


def test_prepare_leaves_a_loader_of_streams_alone(checkpoint_path):
    assert run_ranks(untouched, 2, checkpoint=str(checkpoint_path)) == [True, True]
