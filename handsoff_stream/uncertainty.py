"""How much the members of an ensemble disagree: pure functions of tensors.

Knows formulas. Does not know what the outputs mean, where the pixels lie, or what is done with a score.

Shape letters: M ensemble members, P pixels, K outputs, B batch, H W image size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScoreKind = Literal["sum", "top10_mean"]


def jensen_shannon_divergence(logits_MPK: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the members' class distributions, float32 [P], in nats.

    H(mean_m p_m) - mean_m H(p_m), with p = softmax(logits) (HandsOff, section 3.3); in [0, ln min(M, K)].
    `logits_MPK` must be finite.
    """
    # With pixels in the last dimension a softmax over few classes is vectorized over pixels, and takes a tenth of the
    # time on a CPU.
    log_p_MKP = logits_MPK.float().transpose(1, 2).contiguous().log_softmax(dim=1)
    p_MKP = log_p_MKP.exp()
    entropy_of_mean_P = torch.special.entr(p_MKP.mean(dim=0)).sum(dim=0)
    mean_entropy_P = -(p_MKP * log_p_MKP).sum(dim=1).mean(dim=0)
    # If all members agree, rounding can make the result slightly negative.
    return (entropy_of_mean_P - mean_entropy_P).clamp_(min=0)


def variance(outputs_MPK: Tensor) -> Tensor:
    """Population variance across the members, averaged over the outputs, float32 [P] (HandsOff, section 3.3).

    The unit is the square of the outputs' unit; the variance of a single member is 0.
    """
    return outputs_MPK.float().var(dim=0, correction=0).mean(dim=-1)


def majority_vote(votes_MP: Tensor, num_classes: int) -> Tensor:
    """The class with the most votes, int64 [P]; ties go to the smallest id.

    `votes_MP`: int64 class ids in [0, num_classes).
    """
    votes_PM = votes_MP.t()
    counts_PK = torch.zeros(votes_PM.shape[0], num_classes, dtype=torch.int16, device=votes_MP.device)
    counts_PK.scatter_add_(1, votes_PM, torch.ones_like(votes_PM, dtype=torch.int16))
    return counts_PK.argmax(dim=1)


def image_score(map_BHW: Tensor, kind: ScoreKind = "sum") -> Tensor:
    """One score per image, float32 [B], from its uncertainty map.

    Args:
        map_BHW: floating point, at least 0.
        kind: "sum" over all pixels (HandsOff, section 3.3), which grows with the resolution; or "top10_mean", the mean
            of the most uncertain tenth of the pixels, floor(H * W / 10) but at least one (the published code), which
            does not grow with it.

    Raises:
        ValueError: an unknown kind.
    """
    pixels_BP = map_BHW.float().flatten(1)
    if kind == "sum":
        return pixels_BP.sum(dim=1)
    if kind == "top10_mean":
        count = max(1, pixels_BP.shape[1] // 10)
        return pixels_BP.topk(count, dim=1, sorted=False).values.mean(dim=1)
    raise ValueError(f'image score {kind!r} is unknown; choose "sum" (the paper) or "top10_mean" (the published code)')
