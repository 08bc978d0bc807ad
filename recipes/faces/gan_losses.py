"""Distances between images and their reconstructions, and optimizer updates over the processes of a group.

Knows tensors and optimizers. Does not know networks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def pyramid_distance(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean squared difference of images [B, 3, H, W], averaged over their size and three halvings; a scalar.

    Tiny images are halved less often. The difference is squared because absolute differences lead to the median of all
    faces, which has no eyes and gives no gradient towards them. The mean has faint eyes, which improve the loss as soon
    as they move in the right direction.
    """
    difference = (a_BCHW - b_BCHW).float()
    distances = [difference.square().mean()]
    while len(distances) < 4 and min(difference.shape[2:]) >= 4:
        difference = F.avg_pool2d(difference, 2)
        distances.append(difference.square().mean())
    return torch.stack(distances).mean()


def feature_distance(maps_a: list[Tensor], maps_b: list[Tensor]) -> Tensor:
    """Mean squared difference of feature maps over the mean square of `maps_b`, averaged over the levels; a scalar."""
    levels = [(a - b).float().square().mean() / b.float().square().mean() for a, b in zip(maps_a, maps_b, strict=True)]
    return torch.stack(levels).mean()


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes of the group; does nothing without a group."""
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
