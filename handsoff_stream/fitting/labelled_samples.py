"""Samples of the generator with labels that a network gives them: their latents need no inversion.

The network sees images, so it knows classes by what they look like; the label generator sees features, so it knows
where regions end. Pixels of which the network is certain are learned from beside the labelled images. Knows generators
and a function from images to class probabilities. Does not know where that function comes from.

Shape letters: S samples, B batch, L number of style inputs, D latent size, K classes, H W label size.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.checkpoint import DEFAULT_TRUNCATION
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.device import default_chunk_size
from handsoff_stream.fitting.annotation.sample import generate_chunk
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Rectangle, Size
from handsoff_stream.progress import progress_bar

Predict = Callable[[Tensor], Tensor]
"""Images float32 [B, 3, H, W] in [0, 1], on the generator's device => class probabilities, float [B, K, H, W]."""
SAMPLES_SEED = 2**61
"""Far from the seeds that people choose, so that a stream does not hand out the samples it was fitted on."""
MAX_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How many samples are labelled, and how much is learned from them.

    Raises:
        ValueError: a setting out of its range.
    """

    samples: int = 64
    confidence: float = 0.9
    """A pixel keeps its label if the probability of its class is above this number; in [0, 1)."""
    labelled_share: float = 0.5
    """Share of the drawn pixels that come from the labelled images; in (0, 1). The others come from the samples and are
    drawn in addition, so that 0.5 doubles the steps of an epoch."""
    seed: int = SAMPLES_SEED
    """Of the samples, in [0, 2**64)."""

    def __post_init__(self) -> None:
        if not (1 <= self.samples <= MAX_SAMPLES and 0 <= self.confidence < 1 and 0 < self.labelled_share < 1):
            raise ValueError(
                f"samples={self.samples}, confidence={self.confidence}, labelled_share={self.labelled_share}: pass 1 "
                f"to {MAX_SAMPLES} samples, a confidence in [0, 1), and a share in (0, 1)"
            )


@dataclass(frozen=True)
class LabelledSamples:
    """What `fit_checkpoint` learns from beside the labelled images."""

    w_plus: Tensor
    """float32 [S, L, D] on the CPU."""
    targets: Tensor
    """int64 [S, H, W] on the CPU; `IGNORE_INDEX` where the network is not certain."""
    labelled_share: float
    """See `SampleSettings.labelled_share`."""
    provenance: dict[str, Any]
    """JSON-able: the settings, and how many pixels of each class have a label."""


@torch.no_grad()
def label_samples(
    generator: Generator,
    predict: Predict,
    num_classes: int,
    size: Size,
    settings: SampleSettings | None = None,
    *,
    truncation: float = DEFAULT_TRUNCATION,
    covered: Rectangle | None = None,
    progress: bool = False,
) -> LabelledSamples:
    """Generate samples and label the pixels that `predict` is certain of.

    Args:
        generator: its device does the work.
        predict: class probabilities, of one network or the mean over several; the images have the size of the labels.
        num_classes: K.
        size: (H, W) of the labels.
        settings: how many samples, and from which confidence on.
        truncation: psi of the samples; that of the stream, in [0, 2].
        covered: the part of the generator's image that labelled images show, in its pixels; nothing outside of it is
            labelled. None means all of it.
        progress: show a bar.

    Raises:
        ValueError: `predict` returns another shape, or something other than probabilities, or is certain of no pixel.
    """
    settings = settings or SampleSettings()
    inside_HW = _inside(generator.resolution, size, covered)
    chunk_size = default_chunk_size(generator.w_avg.device)
    w_plus, targets = [], []
    with progress_bar("Labelling samples", settings.samples, show=progress) as update:
        for start in range(0, settings.samples, chunk_size):
            chunk = range(start, start + chunk_size)  # whole, so that these are the bits that a stream labels
            w_plus_BLD, images_B3HW = generate_chunk(generator, settings.seed, chunk, truncation)
            rows = slice(0, settings.samples - start)
            probabilities_BKHW = predict(at_size(images_B3HW[rows], size))
            _check(probabilities_BKHW, (len(images_B3HW[rows]), num_classes, *size))
            certainty_BHW, label_BHW = probabilities_BKHW.max(dim=1)
            label_BHW[certainty_BHW <= settings.confidence] = IGNORE_INDEX
            targets.append(label_BHW.cpu().masked_fill_(~inside_HW, IGNORE_INDEX))
            w_plus.append(w_plus_BLD[rows].cpu())
            update(start + len(label_BHW), "")
    target_SHW = torch.cat(targets)
    pixels_K = [int((target_SHW == k).sum()) for k in range(num_classes)]
    if not any(pixels_K):
        raise ValueError(
            f"no pixel of {settings.samples} samples has a class with a probability above {settings.confidence}; lower "
            "the confidence, or train the network longer"
        )
    about = {**asdict(settings), "truncation": truncation, "pixels_per_class": pixels_K}
    return LabelledSamples(torch.cat(w_plus), target_SHW, settings.labelled_share, about)


def at_size(images_B3HW: Tensor, size: Size) -> Tensor:
    """Images in [0, 1] at the size of the labels; bilinear with antialiasing if that is another one."""
    if tuple(images_B3HW.shape[2:]) == tuple(size):
        return images_B3HW
    return F.interpolate(images_B3HW, size, mode="bilinear", antialias=True).clamp_(0, 1)


def _inside(resolution: Size, size: Size, covered: Rectangle | None) -> Tensor:
    """Whether a label pixel may have a label, bool [H, W]."""
    if covered is None:
        return torch.ones(size, dtype=torch.bool)
    whole = torch.zeros(1, 1, *resolution)
    whole[..., covered.top : covered.bottom, covered.left : covered.right] = 1
    return F.interpolate(whole, size, mode="nearest")[0, 0].bool()


def _check(probabilities_BKHW: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(probabilities_BKHW.shape) != expected:
        raise ValueError(
            f"the network gives {list(probabilities_BKHW.shape)} for {expected[0]} images, but {list(expected)} is "
            "needed; let it predict every class of the labels at every pixel"
        )
    total_BHW = probabilities_BKHW.float().sum(dim=1)
    if not (probabilities_BKHW.min() >= 0 and (total_BHW - 1).abs().max() < 0.01):
        raise ValueError(
            f"the network gives numbers that sum to {float(total_BHW.min()):.3g} .. {float(total_BHW.max()):.3g} over "
            "the classes, so they are no probabilities; wrap networks that return logits with `mean_probabilities`"
        )
