"""Image scores of a seeded sample, which a rolling filter's window starts from, and the usual uncertainty of classes.

Knows checkpoints and the synthesizer. Does not know filters, nor how the checkpoint was fitted.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from handsoff_stream.checkpoint import Calibration, Checkpoint
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.progress import progress_bar
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation
from handsoff_stream.uncertainty import MapScore, class_relative_score, class_totals, image_score

CALIBRATION_SEED = 2**63
"""Far from the seeds that people choose, so that a stream is not filtered by the scores of its own first samples."""
MAP_SCORES: tuple[MapScore, ...] = ("sum", "top10_mean")


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    *,
    num_samples: int = 2000,
    seed: int = CALIBRATION_SEED,
    chunk: int = 16,
    progress: bool = False,
) -> Checkpoint:
    """The same checkpoint with the scores of `num_samples` samples, of all kinds, by its first head.

    For every head with classes, the mean uncertainty of each class is measured too, over all its pixels in all samples.

    Calibrate the weights that will be streamed: rounding them to float16 changes scores a little. Samples are
    synthesized with the checkpoint's truncation and stored noise, where its generator is.

    Args:
        checkpoint: with at least one head.
        num_samples: 2000 place the 90th percentile to about half a percent of the samples.
        seed: of the samples, in [0, 2**64).
        chunk: samples at a time; decides memory and speed.
        progress: show a bar.

    Raises:
        ValueError: a checkpoint without a head, or a count below 1.
    """
    if not checkpoint.heads or num_samples < 1 or chunk < 1:
        raise ValueError(
            f"a checkpoint with {len(checkpoint.heads)} heads, num_samples={num_samples} and chunk={chunk} give "
            "no scores; fit a head first, and pass counts of at least 1"
        )
    options = SynthesisOptions(seed=seed, truncation=checkpoint.truncation)
    synthesizer = Synthesizer(checkpoint, options, checkpoint.generator.w_avg.device)
    first, classes = next(iter(checkpoint.heads)), _num_classes(checkpoint)
    scores: dict[str, list[float]] = {kind: [] for kind in MAP_SCORES}
    totals: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in classes}
    with progress_bar("Calibrating", num_samples, show=progress) as update:
        for start in range(0, num_samples, chunk):
            indices = range(start, min(start + chunk, num_samples))
            found = synthesizer.labeller(synthesizer.generate(indices)[1])
            for kind in MAP_SCORES:
                scores[kind] += image_score(found[first].uncertainty, kind).tolist()
            for name, number in classes.items():
                sums_BK, counts_BK = class_totals(found[name].uncertainty, found[name].label, number)
                totals[name].append((sums_BK.cpu(), counts_BK.cpu()))
            update(indices.stop, "")
    means = {}
    for name, parts in totals.items():
        sums_NK, counts_NK = (torch.cat(part) for part in zip(*parts, strict=True))
        means_K = (sums_NK.double().sum(dim=0) / counts_NK.sum(dim=0)).float()
        means[name] = [None if math.isnan(mean) else mean for mean in means_K.tolist()]
        if name == first:
            scores["class-relative"] = class_relative_score(sums_NK, counts_NK, means_K).tolist()
    return replace(checkpoint, calibration=Calibration(options.calibrated_by(), scores, means))


def _num_classes(checkpoint: Checkpoint) -> dict[str, int]:
    """Number of classes of every head that has classes."""
    tasks = {name: head.task for name, head in checkpoint.heads.items()}
    return {name: task.num_classes for name, task in tasks.items() if isinstance(task, Segmentation)}
