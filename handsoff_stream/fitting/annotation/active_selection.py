"""Which samples of a generator are worth annotating: DatasetGAN's active selection (section 5.1).

    scores of many samples => the uncertain ones, without the most uncertain tenth => a few that cover these

The first step needs a label generator, fitted on whatever is annotated so far. The second is the coreset of Sener and
Savarese, "Active learning for convolutional neural networks: a core-set approach" (ICLR 2018), by greedy k-center.

The distance of two samples is that of their mean hypercolumns. DatasetGAN does not name a feature space. The bound
behind the coreset (theorem 1) holds for distances in the space that the classifier reads, and a label generator reads
hypercolumns, one per pixel and without regard to their order (DatasetGAN, section 3.2; HandsOff, section 3.2). An image
is therefore a distribution of hypercolumns to it, which the mean summarizes.

Knows scores, features, and where a synthesizer gets them. Does not know files.

Shape letters: N samples, B batch, C feature channels.
"""

import torch
from torch import Tensor

from handsoff_stream.device import default_chunk_size
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.progress import progress_bar
from handsoff_stream.synthesizer import Synthesizer, in_chunks

DROPPED_PERCENT = 10
"""k of DatasetGAN: the most uncertain samples, where the generator failed."""
BAND_PERCENT = 10
"""The next most uncertain ones, from which it selects."""


def uncertainty_band(scores_N: Tensor) -> Tensor:
    """Indices int64 of the samples between the 10 % and the 20 % most uncertain, most uncertain first.

    Of equal scores the earlier sample counts as more uncertain.

    Raises:
        ValueError: scores that are not finite.
    """
    if not scores_N.isfinite().all():
        raise ValueError("some scores are NaN or infinite, so samples cannot be ranked; check the checkpoint")
    order_N = scores_N.argsort(descending=True, stable=True)
    first = len(order_N) * DROPPED_PERCENT // 100
    return order_N[first : len(order_N) * (DROPPED_PERCENT + BAND_PERCENT) // 100]


def k_center_greedy(features_NC: Tensor, num_centers: int) -> Tensor:
    """Indices int64 [num_centers] of different samples that cover all of them: none is far from its nearest center.

    The first center is the sample nearest to the mean of all. Each further one is the sample that is farthest from its
    nearest center, the first of equally far ones. The largest distance of a sample to its nearest center is at most
    twice that of the best choice (Sener and Savarese, algorithm 1).

    Raises:
        ValueError: more centers than samples, or none.
    """
    if not 1 <= num_centers <= len(features_NC):
        raise ValueError(
            f"{num_centers} centers among {len(features_NC)} samples cannot be chosen; pass 1 to {len(features_NC)}"
        )
    features_NC = features_NC.double()
    chosen = [int(_squared_distance(features_NC, features_NC.mean(dim=0)).argmin())]
    nearest_N = _squared_distance(features_NC, features_NC[chosen[0]])
    while len(chosen) < num_centers:
        nearest_N[chosen[-1]] = -1.0  # below every distance, so that no sample is chosen twice, not even of equal ones
        chosen.append(int(nearest_N.argmax()))
        nearest_N = torch.minimum(nearest_N, _squared_distance(features_NC, features_NC[chosen[-1]]))
    return torch.tensor(chosen)


def _squared_distance(features_NC: Tensor, center_C: Tensor) -> Tensor:
    # Differences instead of |a|^2 - 2ab + |b|^2, so that the distance of equal samples is exactly zero.
    return (features_NC - center_C).square().sum(dim=1)


def mean_hypercolumn(pyramid: FeaturePyramid) -> Tensor:
    """The mean of every feature map, float32 [B, C]; enlarging the maps by a whole factor would not change it.

    Of a cropped pyramid it is the mean of the native pixels that the crop touches.
    """
    (top, left, bottom, right), (height, width) = pyramid.part, pyramid.finest
    means = []
    for map_BChw in pyramid.maps:
        h, w = map_BChw.shape[2:]
        rows = slice(top * h // height, -(-bottom * h // height))
        columns = slice(left * w // width, -(-right * w // width))
        means.append(map_BChw[:, :, rows, columns].float().mean(dim=(2, 3)))
    return torch.cat(means, dim=1)


def select_actively(
    synthesizer: Synthesizer, num: int, *, candidates: int, progress: bool = False
) -> tuple[list[int], list[float]]:
    """Select samples of a synthesizer's stream by the uncertainty of its first head.

    Args:
        synthesizer: its options say which stream, and which image score ("sum" is DatasetGAN's).
        num: samples to select.
        candidates: from indices 0 to `candidates` - 1.
        progress: show a bar.

    Returns:
        (indices in the order of their selection, their scores).

    Raises:
        ValueError: no head, or fewer than 10 candidates per selected sample.
    """
    if not synthesizer.labeller.tasks:
        raise ValueError(
            "active selection needs the uncertainty of a labelling head, and this is a generator alone; annotate some "
            "random samples first, fit a checkpoint, and select with that"
        )
    needed = num * 100 // BAND_PERCENT
    if candidates < needed:
        raise ValueError(
            f"candidates={candidates} are too few to select num={num} from {BAND_PERCENT} % of them; "
            f"pass {needed} or more"
        )
    chunk_size = default_chunk_size(synthesizer.device)
    scores_N = _scores(synthesizer, candidates, chunk_size, progress)
    band = uncertainty_band(scores_N)
    features_NC = torch.empty(len(band), sum(synthesizer.generator.feature_channels))
    for chunk, rows, places in in_chunks(band.tolist(), chunk_size):
        features_NC[places] = mean_hypercolumn(synthesizer.generate(chunk)[1])[rows].cpu()
    selected = band[k_center_greedy(features_NC, num)]
    return selected.tolist(), scores_N[selected].tolist()


def _scores(synthesizer: Synthesizer, candidates: int, chunk_size: int, progress: bool) -> Tensor:
    """float32 [N] on the CPU: image scores of samples 0 to N - 1, in the chunks of a stream."""
    head = next(iter(synthesizer.labeller.tasks))
    scores: list[Tensor] = []
    with progress_bar("Scoring", candidates, show=progress) as update:
        for start in range(0, candidates, chunk_size):
            label, uncertainty_BHW = synthesizer.label(head, synthesizer.generate(range(start, start + chunk_size))[1])
            scores.append(synthesizer.score(head, label, uncertainty_BHW).cpu())
            update(min(start + chunk_size, candidates), "")
    return torch.cat(scores)[:candidates]
