"""Ranks and DataLoader workers in real processes: disjoint shares, repeated passes, and no rank left waiting."""

import copy
import itertools
import json
import multiprocessing
import pickle

import pytest
from processes import FILTERS, fake_stream, first_batches, indices_of, part_of_run, run_ranks, whole_epoch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from handsoff_stream.errors import StreamError
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.position.dealing import EPOCH_STRIDE
from handsoff_stream.position.state import merge_states


def loader_of(stream, workers=2, **options):
    return DataLoader(stream, batch_size=None, num_workers=workers, **options)


def epochs_of(indices) -> set[int]:
    return {index // EPOCH_STRIDE for index in indices}


# Ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_ranks_reach_workers_that_cannot_ask_for_them(checkpoint_path, context):
    arguments = {"checkpoint": str(checkpoint_path), "workers": 1, "context": context, "batches": 2}
    one, other = run_ranks(first_batches, 2, **arguments)
    assert sorted(one + other) == list(range(16))


@pytest.mark.parametrize(("epoch_size", "ranks", "workers"), [(34, 2, 2), (33, 2, 0), (97, 3, 1)])
def test_every_rank_yields_as_many_batches_as_len_says(checkpoint_path, epoch_size, ranks, workers):
    arguments = {"checkpoint": str(checkpoint_path), "workers": workers, "epoch_size": epoch_size}
    results = run_ranks(whole_epoch, ranks, **arguments)
    per_rank = -(-epoch_size // ranks)
    for result in results:
        assert len(result["sizes"]) == result["len"] == -(-per_rank // 8)
        assert sum(result["sizes"]) == per_rank
    seen = [index for result in results for index in result["seen"]]
    assert len(set(seen)) == len(seen) == per_rank * ranks


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("epoch_size", [97, 3])
def test_len_holds_for_any_number_of_workers(checkpoint, epoch_size, workers):
    stream = fake_stream(checkpoint, batch_size=8, epoch_size=epoch_size)
    batches = list(loader_of(stream, workers))
    assert len(batches) == len(stream) and len(set(indices_of(batches))) == epoch_size


# Epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_passes_of_workers_go_on_with_and_without_set_epoch(checkpoint, persistent, context):
    stream = fake_stream(checkpoint, batch_size=4, epoch_size=16)
    loader = loader_of(stream, persistent_workers=persistent, multiprocessing_context=context)
    seen = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        seen.append(indices_of(loader))
    seen.append(indices_of(loader))
    stream.set_epoch(9)
    seen.append(indices_of(loader))
    assert [epochs_of(one) for one in seen] == [{0}, {1}, {2}, {9}]
    assert all(len(set(one)) == 16 for one in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_was_broken_off_is_not_repeated(checkpoint, workers):
    loader = loader_of(fake_stream(checkpoint, batch_size=4), workers)
    first, second = (indices_of(itertools.islice(loader, 3)) for _ in range(2))
    assert not set(first) & set(second)


def test_set_epoch_keeps_a_loaded_state_of_that_epoch(checkpoint):
    stream = fake_stream(checkpoint, batch_size=4, epoch_size=40)
    stream.set_epoch(3)
    iterator = iter(stream)
    next(iterator)
    state = stream.state_dict()
    for workers in (0, 2):
        resumed = fake_stream(checkpoint, batch_size=4, epoch_size=40)
        resumed.load_state_dict(state)
        resumed.set_epoch(3)
        seen = indices_of(loader_of(resumed, workers))
        assert sorted(seen) == [3 * EPOCH_STRIDE + i for i in range(4, 40)]
    with pytest.warns(UserWarning, match="gives up the loaded position in epoch 3"):
        resumed = fake_stream(checkpoint, batch_size=4, epoch_size=40)
        resumed.load_state_dict(state)
        resumed.set_epoch(0)


# Positions of workers --------------------------------------------------------------------------------------------


def test_positions_of_a_plain_dataloaders_workers_are_not_made_up(checkpoint):
    stream = fake_stream(checkpoint, batch_size=4)
    list(itertools.islice(loader_of(stream), 3))
    with pytest.raises(StreamError, match="positions are not known here; use .*HandsOffLoader or .*StatefulDataLoader"):
        stream.state_dict()
    stream.set_epoch(5)
    assert stream.state_dict()["epoch"] == 5


def test_a_state_loaded_in_the_main_process_positions_workers_once(checkpoint):
    stream = fake_stream(checkpoint, batch_size=4, epoch_size=24)
    iterator = iter(stream)
    first = indices_of([next(iterator)])
    resumed = fake_stream(checkpoint, batch_size=4, epoch_size=24)
    resumed.load_state_dict(stream.state_dict())
    loader = loader_of(resumed)
    assert sorted(first + indices_of(loader)) == list(range(24))
    assert epochs_of(indices_of(loader)) == {1}


def test_states_of_a_stateful_dataloader_merge_for_any_number_of_workers(checkpoint):
    def make(workers):
        return StatefulDataLoader(
            fake_stream(checkpoint, "rolling", batch_size=4), batch_size=None, num_workers=workers
        )

    loader = make(2)
    first = indices_of(itertools.islice(loader, 5))
    for workers in (0, 3):
        resumed = fake_stream(checkpoint, "rolling", batch_size=4)
        resumed.load_state_dict(merge_states([loader.state_dict()]))
        second = indices_of(itertools.islice(loader_of(resumed, workers), 30))
        whole = indices_of(itertools.islice(fake_stream(checkpoint, "rolling", batch_size=4), 60))
        assert not set(first) & set(second)
        assert set(whole[:60]) <= set(first + second)


# Copies ----------------------------------------------------------------------------------------------------------


def first_index(stream, queue):
    queue.put(indices_of([next(iter(stream))])[0])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_peek_changes_neither_workers_nor_copies_in_other_processes(checkpoint, context):
    stream = fake_stream(checkpoint, "rolling", batch_size=4)
    expected = indices_of([next(iter(stream))])[0]
    workers = indices_of(itertools.islice(loader_of(stream, 1, multiprocessing_context=context), 1))
    assert workers[0] == expected
    processes = multiprocessing.get_context(context)
    queue = processes.SimpleQueue()
    process = processes.Process(target=first_index, args=(stream, queue))
    process.start()
    assert queue.get() == expected
    process.join()
    for twin in (pickle.loads(pickle.dumps(stream)), copy.deepcopy(stream)):
        assert indices_of([next(iter(twin))])[0] == expected


def test_an_iterator_owns_its_position(checkpoint):
    stream = fake_stream(checkpoint, batch_size=4)
    one = iter(stream)
    next(one)
    other = iter(stream)
    next(other), next(one)
    assert (one.state_dict()["walk"]["cursor"], one.state_dict()["epoch"]) == (8, 0)
    assert (other.state_dict()["walk"]["cursor"], other.state_dict()["epoch"]) == (EPOCH_STRIDE + 4, 1)
    resumed = fake_stream(checkpoint, batch_size=4)
    resumed.load_state_dict(one.state_dict())
    assert indices_of(itertools.islice(resumed, 2)) == indices_of(itertools.islice(one, 2))


# The loader ------------------------------------------------------------------------------------------------------


def kept(name: str, count: int, checkpoint) -> list[int]:
    return indices_of(itertools.islice(fake_stream(checkpoint, name, batch_size=1), count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_a_loader_resumes_exactly_after_what_was_yielded_however_far_workers_are_ahead(checkpoint, workers, at):
    def make():
        stream = fake_stream(checkpoint, "rolling", batch_size=4, epoch_size=50)
        return HandsOffLoader(stream, num_workers=workers)

    whole = [indices_of([batch]) for batch in make()]
    assert len(whole) == len(make()) == 13
    loader = make()
    first = [indices_of([batch]) for batch in itertools.islice(loader, at)]
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    rest = [indices_of([batch]) for batch in resumed]
    assert first + rest == whole
    assert epochs_of(indices_of(resumed)) == {1}


def test_a_loader_goes_on_with_another_number_of_workers(checkpoint):
    def make(workers, size):
        stream = fake_stream(checkpoint, "rolling", batch_size=size, epoch_size=60)
        return HandsOffLoader(stream, num_workers=workers)

    seen, state = [], None
    for workers, size, batches in ((2, 4, 5), (0, 3, 3), (3, 5, 2), (1, 4, 100)):
        loader = make(workers, size)
        if state is not None:
            loader.load_state_dict(state)
        seen += indices_of(itertools.islice(loader, batches))
        state = loader.state_dict()
    assert len(seen) == len(set(seen)) == 60


def test_a_loop_that_fetches_ahead_asks_for_the_state_after_the_batch_it_trained_on(checkpoint):
    loader = HandsOffLoader(fake_stream(checkpoint, batch_size=4), num_workers=2)
    batches = list(itertools.islice(loader, 6))
    resumed = HandsOffLoader(fake_stream(checkpoint, batch_size=4), num_workers=2)
    resumed.load_state_dict(loader.state_dict(after=batches[3]))
    assert indices_of(itertools.islice(resumed, 2)) == indices_of(batches[4:])
    other = next(iter(fake_stream(checkpoint, batch_size=3)))
    with pytest.raises(ValueError, match="is not known"):
        loader.state_dict(after=other)


def test_persistent_workers_take_up_a_state_that_is_loaded_later(checkpoint):
    loader = HandsOffLoader(
        fake_stream(checkpoint, batch_size=4, epoch_size=24), num_workers=1, persistent_workers=True
    )
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert indices_of(iterator)[-1] == 23
    loader.load_state_dict(state)
    assert indices_of(loader)[0] == 4


# The whole catalog -----------------------------------------------------------------------------------------------


def test_any_change_of_ranks_workers_and_batch_size_and_any_kill_loses_and_repeats_nothing(
    checkpoint, checkpoint_path, tmp_path
):
    """1, 2, 4 and 1 ranks, twice: the same samples as one process without interruption, in the order of each rank."""
    worlds = (  # ranks, batch size, workers of each rank, batches
        *((1, 5, 0, 4), (2, 3, 1, 3), (4, 2, 0, 3), (1, 4, 2, 3)),
        *((1, 7, 0, 2), (2, 4, 0, 3), (4, 3, 0, 2), (1, 9, 0, 50)),
    )
    seen = {name: [] for name in FILTERS}
    state = None
    for number, (ranks, batch_size, workers, batches) in enumerate(worlds):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed = number < len(worlds) - 1  # at some batch of the last filter
        run_ranks(
            part_of_run,
            ranks,
            killed=killed,
            checkpoint=str(checkpoint_path),
            state=None if state is None else str(state),
            folder=str(folder),
            batch_size=batch_size,
            workers=workers,
            batches=batches,
            kill_at=3 * batches + 1 + number % batches if killed else None,
        )
        states = {}
        for name in FILTERS:
            logs = [(folder / f"{name}.{rank}").read_text().splitlines() for rank in range(ranks)]
            for lines in logs:
                mine = [index for line in lines for index in json.loads(line)[0]]
                assert workers > 1 or mine == sorted(mine)
                seen[name] += mine
            states[name] = merge_states([json.loads(lines[-1])[1] for lines in logs])
        state = tmp_path / f"state{number}.json"
        state.write_text(json.dumps(states))
    for name in FILTERS:
        stop = states[name]["walk"]["cursor"]
        whole = [index for index in kept(name, stop, checkpoint) if index < stop]
        assert len(seen[name]) == len(set(seen[name]))
        assert sorted(index for index in seen[name] if index < stop) == whole
        assert len(whole) > 300
