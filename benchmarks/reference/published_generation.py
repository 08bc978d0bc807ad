"""A plain re-implementation of the published generation loop, for comparison on the same weights.

Written from a description of HandsOff's released tools, not from their code. One image at a time:

1. z => w => truncation => image and feature maps, with weights modulated per sample (`plain_stylegan2`).
2. Each map is resized to the label size and copied into one float32 hypercolumn.
3. The members run one after another: softmax, entropy, arg max.
4. The label is the majority vote, the uncertainty the Jensen-Shannon divergence.
5. Image and label are written as PNG, the divergence as float32 npy.

When all are made, the most uncertain tenth is dropped and the rest is read back.

There are three departures, each in favor of the published loop: the hypercolumn is allocated on the device where it is
used (the published code allocates 6 GB on the host and copies them, `host_buffer=True`), votes are counted instead of
calling scipy's slow `mode`, and the published slice that drops the thirty most certain pairs by mistake is left out.
Latents are those of the stream, so that pairs can be compared.

Shape letters: M members, P pixels, C channels, K classes, H W label size.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.reference.plain_stylegan2 import plain_synthesis
from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators import Generator, StyleGAN2, Synthesis
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.seeding import latents
from handsoff_stream.tasks import Segmentation

SCORES = "scores.json"
REJECTED_SHARE = 0.1
"""Share of the pairs, the most uncertain ones, that is dropped."""


@dataclass(frozen=True)
class Pair:
    """One labelled image in host memory."""

    image: NDArray[np.uint8]
    """[H, W, 3]."""
    label: NDArray[np.uint8]
    """[H, W], class ids."""
    divergence: NDArray[np.float32]
    """[H, W], Jensen-Shannon divergence in nats."""
    score: float
    """Mean of the most uncertain tenth of the pixels."""


class PublishedGeneration:
    """The networks of a checkpoint with one segmentation head, run as the published loop runs them.

    Args:
        checkpoint: its generator and head are moved to `device`.
        device: where to compute.
        seed: of the latents; pair i is sample i of a stream with this seed.
        host_buffer: allocate each hypercolumn on the host and copy it to the device first, as the published code does.

    Raises:
        ValueError: the checkpoint crops its images, or has another head than one of segmentation.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, seed: int = 0, host_buffer: bool = False):
        if checkpoint.crop is not None:
            raise ValueError(
                f"crop={checkpoint.crop}, but the published loop labels whole images; measure with a checkpoint "
                "that has no crop"
            )
        self.generator = checkpoint.generator.to(device)
        self.synthesis = _plain(self.generator)
        self.members = [member.to(device) for member in member_networks(_only_head(checkpoint))]
        self.size, self.truncation = checkpoint.size, checkpoint.truncation
        self.device, self.seed, self.host_buffer = device, seed, host_buffer

    @torch.no_grad()
    def __call__(self, index: int) -> Pair:
        """Pair `index`, from the latent of sample `index` of the stream."""
        z = latents(self.seed, [index], self.generator.z_dim).to(self.device)
        w_plus = self.generator.truncate(self.generator.mapping(z), self.truncation)
        synthesis = self.synthesis(w_plus)
        label, divergence, score = self.label(synthesis.features)
        return Pair(self._image(synthesis.images), label, divergence, score)

    @torch.no_grad()
    def label(self, features: FeaturePyramid) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
        """Label, uint8 [H, W], divergence, float32 [H, W] in nats, and score of one image, from its feature maps."""
        rows_PC = self._hypercolumn(features).flatten(2)[0].t()
        mean_PK = torch.zeros((), device=self.device)
        entropy_P = torch.zeros((), device=self.device)
        votes = []
        for member in self.members:
            log_p_PK = member(rows_PC).log_softmax(dim=1)
            p_PK = log_p_PK.exp()
            mean_PK = mean_PK + p_PK / len(self.members)
            entropy_P = entropy_P - (p_PK * log_p_PK).sum(dim=1) / len(self.members)
            votes.append(log_p_PK.argmax(dim=1).cpu().numpy())
        divergence_P = torch.special.entr(mean_PK).sum(dim=1) - entropy_P
        ranked_P = divergence_P.sort().values
        score = float(ranked_P[-max(1, len(ranked_P) // 10) :].mean())
        label_P = majority(np.stack(votes), classes=mean_PK.shape[1])
        return label_P.reshape(self.size), divergence_P.cpu().numpy().reshape(self.size), score

    def _hypercolumn(self, features: FeaturePyramid) -> Tensor:
        shape = (1, features.num_channels, *self.size)
        where = torch.device("cpu") if self.host_buffer else self.device
        hypercolumn = torch.empty(shape, device=where).to(self.device)
        first = 0
        for feature_map in features.maps:
            end = first + feature_map.shape[1]
            hypercolumn[:, first:end] = F.interpolate(feature_map.float(), self.size, mode="bilinear")
            first = end
        return hypercolumn

    def _image(self, image_1CHW: Tensor) -> NDArray[np.uint8]:
        if tuple(image_1CHW.shape[2:]) != tuple(self.size):
            image_1CHW = F.interpolate(image_1CHW, self.size, mode="bilinear")
        levels_CHW = (image_1CHW[0] * 127.5 + 128).clamp(0, 255).byte()
        return levels_CHW.permute(1, 2, 0).cpu().numpy()


def _plain(generator: Generator) -> Callable[[Tensor], Synthesis]:
    """w+ => image and features; of a StyleGAN2 with weights modulated per sample, as published."""
    if not isinstance(generator, StyleGAN2):
        return generator.synthesis
    noise = [buffer for name, buffer in generator.named_buffers() if name.endswith("noise_const")]
    return functools.partial(plain_synthesis, generator, noise=noise)


def _only_head(checkpoint: Checkpoint) -> LabelGenerator:
    heads = [head.label_generator for head in checkpoint.heads.values() if isinstance(head.task, Segmentation)]
    if len(checkpoint.heads) != 1 or len(heads) != 1:
        raise ValueError(
            f"the checkpoint has the heads {list(checkpoint.heads)}, but the published loop labels segmentation only; "
            "measure with a checkpoint of one segmentation head"
        )
    return heads[0]


def member_networks(label_generator: LabelGenerator) -> list[nn.Sequential]:
    """The members of a label generator as M separate networks of ordinary layers, in eval mode."""
    return [_member(label_generator, m).eval().requires_grad_(False) for m in range(label_generator.members)]


def _member(stacked: LabelGenerator, m: int) -> nn.Sequential:
    first, second = stacked.hidden
    layers = {
        "linear1": nn.Linear(sum(stacked.feature_channels), first),
        "norm1": nn.BatchNorm1d(first),
        "linear2": nn.Linear(first, second),
        "norm2": nn.BatchNorm1d(second),
        "linear3": nn.Linear(second, stacked.num_outputs),
    }
    for name, layer in layers.items():
        own = {key: value[m] for key, value in getattr(stacked, name).state_dict().items()}
        layer.load_state_dict({**layer.state_dict(), **own})  # BatchNorm1d has a counter of batches besides
    linear1, norm1, linear2, norm2, linear3 = layers.values()
    return nn.Sequential(linear1, nn.ReLU(), norm1, linear2, nn.ReLU(), norm2, linear3)


def majority(votes_MP: NDArray[np.int64], *, classes: int) -> NDArray[np.uint8]:
    """The class with the most votes, uint8 [P], of votes [M, P]; ties go to the smallest id."""
    counts_KP = np.stack([(votes_MP == k).sum(axis=0) for k in range(classes)])
    return counts_KP.argmax(axis=0).astype(np.uint8)


def write_pairs(generate: PublishedGeneration, folder: Path, *, count: int) -> None:
    """Make pairs 0 .. count - 1, write each as three files, and at the end write all scores."""
    scores = {}
    for index in range(count):
        pair, stem = generate(index), f"{index:012d}"
        Image.fromarray(pair.image).save(folder / f"image_{stem}.png")
        Image.fromarray(pair.label).save(folder / f"label_{stem}.png")
        np.save(folder / f"{stem}.npy", pair.divergence)
        scores[stem] = pair.score
    (folder / SCORES).write_text(json.dumps(scores))


class WrittenPairs(Dataset[tuple[Tensor, Tensor]]):
    """The pairs of `write_pairs` that are kept: image float32 [3, H, W] in [0, 1], label int64 [H, W]."""

    def __init__(self, folder: Path):
        scores: dict[str, float] = json.loads((folder / SCORES).read_text())
        ranked = sorted(scores, key=scores.__getitem__)
        self.stems = sorted(ranked[: len(ranked) - int(len(ranked) * REJECTED_SHARE)])
        self.folder = folder

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        stem = self.stems[position]
        image = torch.from_numpy(np.array(Image.open(self.folder / f"image_{stem}.png")))
        label = torch.from_numpy(np.array(Image.open(self.folder / f"label_{stem}.png")))
        return image.permute(2, 0, 1).float() / 255, label.long()
