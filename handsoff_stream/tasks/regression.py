"""The loss of all tasks whose labels are numbers.

Knows outputs and targets of single pixels. Does not know what the numbers mean.

Shape letters: P pixels, K outputs.
"""

import torch
from torch import Tensor


def mean_squared_error(outputs_PK: Tensor, target: Tensor) -> Tensor:
    """Mean over the finite entries of the target, a scalar; 0 if there are none (HandsOff, section 3.3).

    Args:
        outputs_PK: floating point.
        target: floating point [P, K], or [P] if K is 1. Entries that are NaN or infinite are unlabelled: they neither
            count nor have a gradient.

    Raises:
        ValueError: a target of any other shape.
    """
    if target.shape != outputs_PK.shape and (*target.shape, 1) != tuple(outputs_PK.shape):
        raise ValueError(
            f"target {list(target.shape)} has no number for each of the outputs {list(outputs_PK.shape)}; give as many "
            "numbers per pixel as the task has outputs"
        )
    target_PK = target.reshape(outputs_PK.shape)
    known_PK = target_PK.isfinite()
    # Infinity must be replaced before squaring: masking it afterwards would still give a NaN gradient.
    error_PK = torch.where(known_PK, outputs_PK - target_PK, 0.0)
    return error_PK.square().sum() / known_PK.sum().clamp(min=1)
