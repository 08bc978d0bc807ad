"""A small generator, and images that remember which of them were read."""

import torch
from torch import Tensor

from handsoff_stream.generators import StyleGAN2


class Recorded(list[tuple[str, Tensor]]):
    """A list of images that remembers which were read, and stops the program at the `stop`-th reading."""

    def __init__(self, images: list[tuple[str, Tensor]], stop: int = 10**9) -> None:
        super().__init__(images)
        self.read: list[str] = []
        self.stop = stop

    def __getitem__(self, index):
        if len(self.read) == self.stop:
            raise KeyboardInterrupt
        self.read.append(super().__getitem__(index)[0])
        return super().__getitem__(index)


def small_generator() -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StyleGAN2(channels=(8, 8, 8, 8), z_dim=16, w_dim=16, mapping_layers=2)
    for block in model.blocks:
        block.to_rgb.conv.weight.data.mul_(0.3)  # images about [-1, 1], as those of a trained generator
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    model.w_avg.copy_(model.mapping(z).mean(dim=0).detach())
    return model.eval().requires_grad_(False)
