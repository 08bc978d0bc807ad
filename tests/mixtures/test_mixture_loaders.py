"""Mixtures in worker processes, and in loaders that know their position."""

import itertools
from fractions import Fraction

import pytest
from conftest import assert_same, take
from mixtures import SIZE, expected_beside, mixture, rows, through_json
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from handsoff_stream.outlets.loader import HandsOffLoader


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_hand_out_the_same(checkpoint_path, context):
    options = {"filter": "none", "batch_size": 6, "share": Fraction(2, 3), "epoch_size": 24}
    alone = rows(mixture(checkpoint_path, **options))
    loader = DataLoader(
        mixture(checkpoint_path, **options), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    assert sorted(rows(loader)) == sorted(alone)


def test_a_dataloader_that_collates_sees_the_share(checkpoint):
    loader = DataLoader(mixture(checkpoint, Fraction(1, 4), as_dict=True, filter="none"), batch_size=8)
    for batch in take(loader, 3):
        assert batch["image"].shape == (8, 3, SIZE, SIZE) and int((batch["index"] < 0).sum()) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"share": Fraction(3, 4)}, {"share": Fraction(1, 4)}], ids=str)
@pytest.mark.parametrize("epoch_size", [None, 9])
def test_a_loader_resumes_exactly_with_as_many_workers(checkpoint_path, workers, kind, epoch_size):
    def make():
        mixed = mixture(checkpoint_path, filter="threshold", epoch_size=epoch_size, **kind)
        return HandsOffLoader(mixed, num_workers=workers, multiprocessing_context="fork" if workers else None)

    loader, items, states = make(), [], []
    for item in itertools.islice(loader, 9):
        items.append(item)
        states.append(through_json(loader.state_dict()))
    for step in range(2, len(items), 3):
        resumed = make()
        resumed.load_state_dict(states[step - 1])
        assert_same(take(resumed, len(items) - step), items[step:])


@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"share": Fraction(3, 4), "as_dict": True}], ids=str)
def test_another_number_of_workers_goes_on_without_repeating_or_skipping(checkpoint_path, kind):
    def make(workers):
        mixed = mixture(checkpoint_path, filter="threshold", epoch_size=30, **kind)
        return HandsOffLoader(mixed, num_workers=workers, multiprocessing_context="fork" if workers else None)

    found, state = [], None
    for workers, count in ((2, 3), (3, 5), (1, 4), (2, 1000)):
        loader = make(workers)
        if state is not None:
            loader.load_state_dict(state)
        found += rows(itertools.islice(loader, count))
        state = through_json(loader.state_dict())
    share = kind.get("share", Fraction(1, 2))
    samples = {row for row in found if row[0] >= 0}
    assert len(samples) == 30 and len(found) == len(set(found)) == 30 / (1 - share)
    beside = {row for index, _ in samples for row in expected_beside(index, index, share, 5)}
    assert set(found) - samples == beside


def test_the_state_after_a_batch_that_was_yielded_before_is_known(checkpoint):
    loader = HandsOffLoader(mixture(checkpoint, batch_size=4))
    batches = iter(loader)
    first, second = next(batches), next(batches)
    resumed = HandsOffLoader(mixture(checkpoint, batch_size=4))
    resumed.load_state_dict(loader.state_dict(after=first))
    assert_same(next(iter(resumed)), second)


@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"share": Fraction(3, 5)}], ids=str)
def test_a_stateful_dataloader_resumes_exactly(checkpoint_path, kind):
    def make():
        mixed = mixture(checkpoint_path, **kind)
        return StatefulDataLoader(mixed, batch_size=None if "batch_size" in kind else 4, num_workers=2)

    loader = make()
    iterator = iter(loader)
    take(iterator, 3)
    state = loader.state_dict()
    expected = take(iterator, 4)
    resumed = make()
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), expected)
