"""The re-implemented published training reads the same features as this package, and trains and stops as described."""

import pytest
import torch
from torch import Tensor

from benchmarks.reference import published_fitting as published
from handsoff_stream.fitting import FeatureTable
from handsoff_stream.generators import StyleGAN2


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_clusters(count: int) -> tuple[Tensor, Tensor]:
    """Rows of two classes that one number tells apart, and their ids."""
    ids = torch.arange(count) % 2
    return torch.randn(count, 6, generator=random(1)) + 4 * ids[:, None], ids


def test_its_matrix_holds_the_rows_that_ours_reads():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(channels=(8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2).requires_grad_(False)
    w_plus = torch.randn(3, generator.num_ws, 8, generator=random(0))
    matrix = published.hypercolumn_matrix(generator, w_plus, (16, 16))
    rows = FeatureTable.collect(generator, w_plus, (16, 16)).rows(torch.arange(3 * 16 * 16))
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, rows, rtol=0, atol=2e-3 * rows.abs().max().item())


def test_a_member_learns_what_one_number_tells(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(published, "LEARNING_RATE", 0.01)
    rows, ids = two_clusters(640)
    member = published.make_member(6, (16, 8), 2, random(0))
    steps = []
    for step, _ in published.train_member(member, rows, ids, random(2), max_epochs=4):
        assert not member.training
        steps.append(step)
    assert steps == [10, 20, 30, 40]
    assert (member(rows).argmax(dim=1) == ids).float().mean() > 0.95


def test_a_loss_that_never_improves_ends_the_training_after_fifty_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(published, "LEARNING_RATE", 0.0)
    rows, ids = torch.zeros(64 * 30, 6), torch.zeros(64 * 30, dtype=torch.int64)
    epochs = list(published.train_member(published.make_member(6, (4, 4), 2, random(0)), rows, ids, random(2)))
    assert [step for step, _ in epochs] == [30, 60, 90, 120, 150, 120 + 1 + published.MAX_WORSE_BATCHES]
    seconds = [elapsed for _, elapsed in epochs]
    assert seconds == sorted(seconds)
