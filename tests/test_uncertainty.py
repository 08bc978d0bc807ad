"""The formulas of uncertainty give numbers computed by hand, and those of the published code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from handsoff_stream.uncertainty import (
    above_class_mean,
    class_relative_score,
    class_totals,
    image_score,
    jensen_shannon_divergence,
    majority_vote,
    mean_probabilities,
    variance,
)

EXPECTED = np.load(Path(__file__).parent / "data" / "label_generator" / "expected.npz")


def expected(name: str) -> torch.Tensor:
    return torch.from_numpy(EXPECTED[name])


def test_divergence_matches_the_published_code() -> None:
    divergence = jensen_shannon_divergence(expected("logits"))
    torch.testing.assert_close(divergence.view(16, 16), expected("js"), atol=1e-5, rtol=0)


def test_two_members_certain_of_different_classes_diverge_by_ln_2() -> None:
    logits = torch.tensor([[[1000.0, 0.0, 0.0]], [[0.0, 1000.0, 0.0]]])
    torch.testing.assert_close(jensen_shannon_divergence(logits), torch.tensor([math.log(2)]))


def test_members_that_agree_do_not_diverge() -> None:
    logits = torch.randn(1, 50, 7, generator=torch.Generator().manual_seed(0)).expand(10, -1, -1)
    divergence = jensen_shannon_divergence(logits)
    assert (divergence >= 0).all() and divergence.max() < 1e-6


@given(arrays(np.float32, (4, 5, 3), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=50, deadline=None)
def test_divergence_equals_the_definition_in_double_precision(logits: np.ndarray) -> None:
    p = torch.from_numpy(logits).double().softmax(-1)
    reference = torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
    divergence = jensen_shannon_divergence(torch.from_numpy(logits))
    assert divergence.dtype == torch.float32 and (divergence >= 0).all()
    torch.testing.assert_close(divergence.double(), reference, atol=1e-5, rtol=0)


def test_variance_is_the_population_variance_averaged_over_the_outputs() -> None:
    outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
    torch.testing.assert_close(variance(outputs), torch.tensor([0.5]))
    assert variance(outputs[:1]).tolist() == [0.0]


def test_votes_match_the_published_code() -> None:
    votes = expected("votes").flatten(0, 1).T
    assert torch.equal(majority_vote(votes, 5), expected("label_mode").flatten())


def test_tied_votes_go_to_the_smallest_id() -> None:
    votes = torch.tensor([[4, 2, 1], [2, 0, 1], [0, 2, 3], [4, 0, 3]])
    assert majority_vote(votes, 5).tolist() == [4, 0, 1]


def test_top_tenth_matches_the_published_code() -> None:
    score = image_score(expected("js")[None], "top10_mean")
    torch.testing.assert_close(score[0], expected("uncertainty_score"), atol=1e-5, rtol=0)


def test_scores_are_one_number_per_image() -> None:
    maps = torch.stack([torch.zeros(4, 5), torch.arange(20.0).view(4, 5)])
    assert image_score(maps).tolist() == [0.0, 190.0]
    assert image_score(maps, "top10_mean").tolist() == [0.0, 18.5]


def test_top_tenth_of_a_tiny_image_is_one_pixel() -> None:
    assert image_score(torch.tensor([[[1.0, 5.0]]]), "top10_mean").tolist() == [5.0]


def test_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="top10_mean"):
        image_score(torch.zeros(1, 2, 2), "mean")  # type: ignore[arg-type]


def test_soft_labels_are_the_mean_of_the_members_distributions() -> None:
    logits_MPK = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([member.softmax(dim=1) for member in logits_MPK]).mean(dim=0)
    torch.testing.assert_close(mean_probabilities(logits_MPK), expected)


# Relative to the class

MAP = torch.tensor([[[1.0, 3.0], [10.0, 0.5]], [[2.0, 2.0], [2.0, 2.0]]])
LABELS = torch.tensor([[[0, 0], [1, 3]], [[0, 0], [0, 0]]])
MEANS = torch.tensor([2.0, 8.0, 1.0, math.nan])


def test_the_totals_of_an_image_are_those_of_its_pixels_class_by_class() -> None:
    sums, counts = class_totals(MAP, LABELS, 4)
    assert sums.tolist() == [[4.0, 10.0, 0.0, 0.5], [8.0, 0.0, 0.0, 0.0]]
    assert counts.tolist() == [[2, 1, 0, 1], [4, 0, 0, 0]]


def test_an_image_is_as_uncertain_as_its_classes_on_average_and_classes_without_a_mean_do_not_count() -> None:
    assert class_relative_score(*class_totals(MAP, LABELS, 4), MEANS).tolist() == [(2 / 2 + 10 / 8) / 2, 1.0]
    unknown = torch.full((4,), math.nan)
    assert class_relative_score(*class_totals(MAP, LABELS, 4), unknown).tolist() == [0.0, 0.0]


def test_the_score_of_a_broken_map_is_not_finite() -> None:
    broken = MAP.clone()
    broken[1, 0, 0] = math.inf
    scores = class_relative_score(*class_totals(broken, LABELS, 4), MEANS)
    assert scores[0].isfinite() and not scores[1].isfinite()


def test_pixels_are_compared_with_the_mean_of_their_own_class() -> None:
    assert above_class_mean(MAP, LABELS, MEANS, 1.25)[0].tolist() == [[False, True], [False, False]]
    assert above_class_mean(MAP, LABELS, MEANS, 1.2)[0].tolist() == [[False, True], [True, False]]
