"""The offline half: labelled images and a generator => a checkpoint to stream from.

Inversion finds the latent of each image that comes without one, fitting learns labels from the feature maps of these
latents, calibration scores a sample of what the checkpoint generates. Where there are no labelled images, samples of
the generator can be annotated. Nothing here is needed once the checkpoint is written.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.checkpoint import DEFAULT_TRUNCATION, Checkpoint, Head
from handsoff_stream.fitting.annotation.sample import write_samples
from handsoff_stream.fitting.augment import ViewSettings, with_views
from handsoff_stream.fitting.calibration import calibrate
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode_images
from handsoff_stream.fitting.encoder.train import EncoderSettings, train_encoder
from handsoff_stream.fitting.feature_table import FeatureTable
from handsoff_stream.fitting.fit import FitReport, FitSettings, fit_label_generator
from handsoff_stream.fitting.inversion.descent import Inversion, InversionSettings, invert
from handsoff_stream.fitting.inversion.latents import LatentSpace, find_latents, read_latent
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.fitting.inversion.store import invert_images
from handsoff_stream.generators import Generator
from handsoff_stream.tasks import Task

__all__ = [
    "EncoderSettings",
    "FeatureTable",
    "FitReport",
    "FitSettings",
    "Inversion",
    "InversionSettings",
    "LatentSpace",
    "Perceptual",
    "ViewSettings",
    "calibrate",
    "encode_images",
    "fit_checkpoint",
    "fit_label_generator",
    "invert",
    "invert_images",
    "load_perceptual",
    "load_restyle",
    "read_latent",
    "train_encoder",
    "with_views",
    "write_samples",
]


def fit_checkpoint(
    generator: Generator,
    images: Sequence[tuple[str, Tensor]],
    targets: Tensor,
    task: Task,
    out_dir: str | Path,
    *,
    inversion: InversionSettings | None = None,
    fit: FitSettings | None = None,
    perceptual: Perceptual | None = None,
    encodings: Mapping[str, Tensor] | None = None,
    latents: Mapping[str, Tensor] | None = None,
    truncation: float = DEFAULT_TRUNCATION,
    calibration_samples: int = 2000,
    memory_gb: float | None = None,
    cache_dir: str | Path | None = None,
    sources: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Invert what has no latent yet, fit, calibrate.

    Args:
        generator: what images are inverted into, and will be streamed from; its device does the work.
        images: (name, float32 [3, H, W] in [0, 1]) of the generator's resolution.
        targets: [N, H, W] or [N, H, W, K], one per image, whatever `task.loss` takes for a pixel.
        task: becomes the head named `task.name`.
        out_dir: where inversions are kept; see `invert_images`.
        inversion, fit: settings; the defaults if None.
        perceptual: image distance of the inversion; `load_perceptual()` if None and there is something to invert.
        encodings: name => w_e of an encoder, to start from and stay near.
        latents: name => w+ [L, D] of the images that need no inversion, because this generator made them.
        truncation: psi that the checkpoint's streams use by default, and that it is calibrated with.
        calibration_samples: 0 leaves the calibration to the caller, as one must who stores float16 weights.
        memory_gb, cache_dir: for the features of the images; see `FeatureTable.collect`.
        sources: file => sha256, for provenance.
        progress: show bars.
    """
    inversion, fit = inversion or InversionSettings(), fit or FitSettings()
    found = find_latents(
        generator,
        images,
        latents or {},
        out_dir,
        inversion=inversion,
        perceptual=perceptual,
        encodings=encodings,
        progress=progress,
    )
    size = (targets.shape[1], targets.shape[2])
    table = FeatureTable.collect(generator, found.w_plus, size, memory_gb=memory_gb, cache_dir=cache_dir)
    label_generator, report = fit_label_generator(table, targets, task, fit, progress=progress)
    provenance: dict[str, Any] = {
        "sources": dict(sources or {}),
        "images": [name for name, _ in images],
        **found.provenance,
        "fit": {
            **fit.config(),
            "epoch": report.epoch,
            "accuracy": report.accuracy,
            "held_out_loss": report.held_out_loss,
        },
        "versions": {"handsoff_stream": version("handsoff_stream"), "torch": torch.__version__},
    }
    heads = {task.name: Head(task, label_generator)}
    checkpoint = Checkpoint(generator, heads, size, truncation=truncation, provenance=provenance)
    if calibration_samples == 0:
        return checkpoint
    return calibrate(checkpoint, num_samples=calibration_samples, progress=progress)
