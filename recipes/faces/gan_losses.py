"""Distances and updates that training needs: of reconstructions, and over the processes of a group.

Knows tensors and optimizers. Does not know networks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def pyramid_distance(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean squared difference, averaged over the images and three halvings of them (fewer for tiny ones).

    Squared, not absolute: the median of all faces has no eyes, and a generator that has found it is told nothing about
    where they might be; the mean has shadows of them, which pay as soon as they move the right way.
    """
    difference = (a_BCHW - b_BCHW).float()
    distances = [difference.square().mean()]
    while len(distances) < 4 and min(difference.shape[2:]) >= 4:
        difference = F.avg_pool2d(difference, 2)
        distances.append(difference.square().mean())
    return torch.stack(distances).mean()


def feature_distance(maps_a: list[Tensor], maps_b: list[Tensor]) -> Tensor:
    """Mean squared difference of feature maps relative to that of `maps_b` from zero, averaged over levels."""
    levels = [(a - b).float().square().mean() / b.float().square().mean() for a, b in zip(maps_a, maps_b, strict=True)]
    return torch.stack(levels).mean()


def average(tensors: list[Tensor]) -> None:
    """In place, the mean of each tensor over the processes of the group; nothing without a group."""
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


def update(optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` on the gradients averaged over the group."""
    average([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
    optimizer.step()
