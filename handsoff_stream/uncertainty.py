"""How much the members of an ensemble disagree: pure functions of tensors.

Knows formulas. Does not know what the outputs mean, where the pixels lie, or what is done with a score.

Shape letters: M ensemble members, P pixels, K outputs, B batch, H W image size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MapScore = Literal["sum", "top10_mean"]
"""Scores of an image that its uncertainty map alone decides."""
ScoreKind = Literal["sum", "top10_mean", "class-relative"]


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


def mean_probabilities(logits_MPK: Tensor) -> Tensor:
    """Mean of the members' class distributions, float32 [P, K]; each row sums to 1."""
    p_MKP = logits_MPK.float().transpose(1, 2).contiguous().softmax(dim=1)
    return p_MKP.mean(dim=0).t()


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


def class_totals(map_BHW: Tensor, labels_BHW: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum of an uncertainty map over the pixels of each class, float32 [B, K], and their number, int64 [B, K].

    A map that is not finite gives sums that are not finite. Classes are added up one by one, in an order that does not
    change from run to run on any device.

    Args:
        map_BHW: floating point.
        labels_BHW: int64 class ids in [0, num_classes).
        num_classes: K.
    """
    of_class = [labels_BHW == k for k in range(num_classes)]
    sums_BK = torch.stack([(map_BHW.float() * mask_BHW).sum(dim=(1, 2)) for mask_BHW in of_class], dim=1)
    return sums_BK, torch.stack([mask_BHW.sum(dim=(1, 2)) for mask_BHW in of_class], dim=1)


def class_relative_score(sums_BK: Tensor, counts_BK: Tensor, means_K: Tensor) -> Tensor:
    """One score per image, float32 [B]: the mean over its classes of (mean uncertainty of the class / its usual mean).

    1 is an image as uncertain as usual. Large and small classes count alike, and a class that is always uncertain, such
    as glasses, does not raise the score of the images that show it. A class without a usual mean does not count.

    Args:
        sums_BK: see `class_totals`.
        counts_BK: see `class_totals`.
        means_K: mean uncertainty of each class over many samples, float32; NaN or 0 where there is none.
    """
    counted_BK = (counts_BK > 0) & (means_K > 0)
    usual_BK = torch.where(counted_BK, means_K, 1)
    ratio_BK = torch.where(counted_BK, sums_BK / counts_BK.clamp(min=1) / usual_BK, 0)
    broken_B = ~sums_BK.isfinite().all(dim=1)
    return (ratio_BK.sum(dim=1) / counted_BK.sum(dim=1).clamp(min=1)).masked_fill(broken_B, torch.nan)


def above_class_mean(map_BHW: Tensor, labels_BHW: Tensor, means_K: Tensor, factor: float) -> Tensor:
    """Pixels whose uncertainty is above `factor` times the mean of their class, bool [B, H, W].

    FreeMask (Yang et al., NeurIPS 2023) leaves out pixels whose loss is above 1.25 times the mean of their
    class. A common bound for all classes would remove the rare and small ones first.

    Args:
        map_BHW: floating point, at least 0.
        labels_BHW: int64 class ids in [0, K).
        means_K: see `class_relative_score`; no pixel is above a mean that is NaN.
        factor: above 0.
    """
    return map_BHW > factor * means_K[labels_BHW]


def image_score(map_BHW: Tensor, kind: MapScore = "sum") -> Tensor:
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
