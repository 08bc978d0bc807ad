"""Indices => LabelledBatch: latents, one pass of the generator, labels and scores.

    index => z => w => w+ => image and feature maps => label and uncertainty of each head => image score

Does not know streams, filters, shards or files, nor how labels are computed. The same indices in the same chunk give
the same bits.

Shape letters: B batch, H W image size.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.batch import LabelledBatch, Labels
from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.generators.base import Noise
from handsoff_stream.geometry import Rectangle
from handsoff_stream.labeller import Labelled, Labeller, on_device
from handsoff_stream.noise import noise_maps
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.precision import compute_dtype
from handsoff_stream.seeding import latents
from handsoff_stream.source import class_means
from handsoff_stream.uncertainty import above_class_mean, class_relative_score, class_totals, image_score


class Synthesizer:
    """The networks on their device, prepared once; calling it with indices is cheap.

    Args:
        checkpoint: generator, heads, output size and crop.
        options: what decides a sample.
        device: where to compute; `checkpoint` stays where it is.

    Raises:
        ValueError: a precision or a kernel that this device cannot run; an output size that would cut pixels at the
            edge of the crop; options for classes that the checkpoint has no classes or no calibration for.
    """

    def __init__(self, checkpoint: Checkpoint, options: SynthesisOptions, device: torch.device):
        self.options = options
        self.device = device
        self.size = checkpoint.size
        height, width = checkpoint.generator.resolution
        self.crop = checkpoint.crop
        part = self.crop or Rectangle(0, 0, height, width)
        self._whole_size, self._corner = part.placement(self.size, (height, width))
        dtype = compute_dtype(options.precision, device)
        self.generator = on_device(checkpoint.generator, device)
        self._synthesis = self.generator.fold(dtype)
        tasks = {name: head.task.config() for name, head in checkpoint.heads.items()}
        means = class_means(checkpoint.calibration, tasks, options)
        self._class_means = {
            name: torch.tensor([math.nan if mean is None else mean for mean in values], device=device)
            for name, values in means.items()
        }
        soft = options.labels == "soft"
        self.labeller = Labeller(checkpoint, device, dtype=dtype, kernel=options.kernel, soft=soft)

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> LabelledBatch:
        """Synthesize and label the samples of these indices; tensors lie on `device`."""
        images, labels, uncertainty = self.compute(*self.inputs(indices))
        return LabelledBatch(
            images=images,
            labels=labels,
            uncertainty=uncertainty,
            indices=torch.tensor(indices, dtype=torch.int64),
            next_index=indices[-1] + 1,
        )

    @torch.no_grad()
    def generate(self, indices: Sequence[int]) -> tuple[Tensor, FeaturePyramid]:
        """Images float32 [B, 3, H, W] in [0, 1] on 8-bit levels, and the feature maps behind them."""
        return self._generate(*self.inputs(indices))

    def inputs(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """What differs from chunk to chunk: latents float32 [B, z_dim], then any fresh noise maps, on `device`."""
        z = self._upload(latents(self.options.seed, indices, self.generator.z_dim))
        if self.options.noise != "random":
            return (z,)
        return z, *noise_maps(self.options.seed, indices, self.generator.noise_shapes, self.device)

    @torch.no_grad()
    def compute(self, z: Tensor, *maps: Tensor) -> tuple[Tensor, Labels, Tensor]:
        """Images, labels and image scores of `inputs`, as a `LabelledBatch` holds them; work on the device alone."""
        images, features = self._generate(z, *maps)
        found = self.labeller(features)
        labels = {name: self._streamed(name, one) for name, one in found.items()}
        first = next(iter(found))
        score = self.score(first, found[first].label, found[first].uncertainty)
        return images, labels if len(labels) > 1 else next(iter(labels.values())), score

    def score(self, name: str, label_BHW: Tensor, uncertainty_BHW: Tensor) -> Tensor:
        """Image scores float32 [B], of the kind that the options name, from what the head `name` says."""
        if self.options.score != "class-relative":
            return image_score(uncertainty_BHW, self.options.score)
        means_K = self._class_means[name]
        return class_relative_score(*class_totals(uncertainty_BHW, label_BHW, len(means_K)), means_K)

    def _streamed(self, name: str, one: Labelled) -> Tensor:
        """The label as a batch holds it: ids or probabilities, ignored pixels with `IGNORE_INDEX` or zeros."""
        label = one.label if one.probabilities is None else one.probabilities
        if self.options.ignore == "none" or name not in self._class_means:
            return label
        means_K, factor = self._class_means[name], self.options.ignore_factor
        ignored_BHW = above_class_mean(one.uncertainty, one.label, means_K, factor)
        if one.probabilities is not None:
            return label.masked_fill(ignored_BHW[:, None], 0)
        return label.masked_fill(ignored_BHW, IGNORE_INDEX)

    def _generate(self, z: Tensor, *maps: Tensor) -> tuple[Tensor, FeaturePyramid]:
        w_plus = self.generator.truncate(self.generator.mapping(z), self.options.truncation)
        noise: Noise = maps if self.options.noise == "random" else self.options.noise
        synthesis = self._synthesis(w_plus, noise)
        return self._output(synthesis.images, synthesis.features)

    def _output(self, images_BCHW: Tensor, features: FeaturePyramid) -> tuple[Tensor, FeaturePyramid]:
        """What is streamed of an image in [-1, 1], and the features of that part."""
        images_BCHW = quantize(images_BCHW, self._whole_size)
        if self.crop is None:
            return images_BCHW, features
        (top, left), (height, width) = self._corner, self.size
        images_BCHW = images_BCHW[..., top : top + height, left : left + width].contiguous()
        return images_BCHW, features.crop(self.crop.rows, self.crop.columns)

    def _upload(self, tensor: Tensor) -> Tensor:
        """To the device without making the host wait: only from pinned memory is a copy asynchronous."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def label(self, name: str, features: FeaturePyramid) -> tuple[Tensor, Tensor]:
        """What one head decides, with no pixel ignored, and its uncertainty.

        Returns:
            Labels int64 [B, H, W] or float32 [B, K, H, W], and uncertainty float32 [B, H, W].

        Raises:
            KeyError: a head that the checkpoint does not have.
        """
        return self.labeller(features, [name])[name][:2]


def in_chunks(indices: Sequence[int], chunk_size: int) -> Iterator[tuple[range, list[int], list[int]]]:
    """The aligned chunks that hold some indices: (chunk, rows of it, places in `indices` that these rows take).

    A sample's bits depend on the shape of the chunk that it is computed in, so whoever wants the samples of a stream
    computes them in its chunks.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index // chunk_size, []).append(place)
    for number, some in places.items():
        first = number * chunk_size
        yield range(first, first + chunk_size), [indices[place] - first for place in some], some


def quantize(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Generator output in [-1, 1] => float32 in [0, 1] on 8-bit levels, resized to `size` if it differs.

    Resizing is bilinear without antialiasing, as the published code does; level = floor(127.5 x + 128), clamped to
    0 .. 255, as the published PNG writers do. What is exported as 8-bit files later equals what was streamed.
    """
    if tuple(images_BCHW.shape[2:]) != tuple(size):
        images_BCHW = F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False)
    return images_BCHW.mul(127.5).add(128).floor().clamp(0, 255).div(255)
