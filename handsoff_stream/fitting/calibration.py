"""Image scores of a seeded sample, which a rolling filter's window starts from.

Knows checkpoints and the synthesizer. Does not know filters, nor how the checkpoint was fitted.
"""

from dataclasses import replace

import torch

from handsoff_stream.checkpoint import Calibration, Checkpoint
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.progress import progress_bar
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.uncertainty import image_score

CALIBRATION_SEED = 2**63
"""Far from the seeds that people choose, so that a stream is not filtered by the scores of its own first samples."""
SCORES = ("sum", "top10_mean")


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    *,
    num_samples: int = 2000,
    seed: int = CALIBRATION_SEED,
    chunk: int = 16,
    progress: bool = False,
) -> Checkpoint:
    """The same checkpoint with the scores of `num_samples` samples, of both kinds, by its first head.

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
    head = next(iter(checkpoint.heads))
    scores: dict[str, list[float]] = {kind: [] for kind in SCORES}
    with progress_bar("Calibrating", num_samples, show=progress) as update:
        for start in range(0, num_samples, chunk):
            indices = range(start, min(start + chunk, num_samples))
            _, uncertainty_BHW = synthesizer.label(head, synthesizer.generate(indices)[1])
            for kind, values in scores.items():
                values += image_score(uncertainty_BHW, kind).tolist()  # type: ignore[arg-type]
            update(indices.stop, "")
    return replace(checkpoint, calibration=Calibration(options.calibrated_by(), scores))
