"""The teacher of `comparison`: a segmentation network trained on unlimited labelled renders, which labels samples.

Knows how the teacher is trained and what is fitted on its labels. Does not know the arms that need it.
"""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.downstream.batches import Experiment, class_names_of, labels_of, load_teacher, unlimited
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.datasets.rendered_faces import FINE_PALETTE, PALETTE
from handsoff_stream.device import resolve_device
from handsoff_stream.downstream import SegmentationScores, evaluate, train_segmentation
from handsoff_stream.fitting import FitSettings, fit_checkpoint, invert
from handsoff_stream.fitting.annotation.sample import regenerate
from handsoff_stream.fitting.from_files import save_calibrated
from handsoff_stream.tasks import Segmentation

TEACHER_SEED = 1000
"""Seed of the teacher; far from the compared seeds, so that no arm sees the teacher's renders."""
SAMPLES_SEED = 2**62
"""Seed of the samples that the arm `datasetgan` is fitted on; no stream uses it."""


def experiment_of_teacher(checkpoint: str, teacher: Path, *, labelled: int, validation_images: int) -> Experiment:
    """What `train_teacher` and `load_teacher` need, for a teacher without arms; the fields that arms use are empty.

    Args:
        checkpoint: name or path; its classes and its size are the teacher's.
        teacher: file of its weights.
        labelled: labelled images.
        validation_images: renders to score it on.
    """
    return Experiment(
        checkpoint=checkpoint,
        truncation=None,
        class_names=class_names_of(checkpoint),
        labelled=labelled,
        size=load_checkpoint(checkpoint).generator.resolution[0],
        varied=False,
        backbone="efficientnet-lite0",
        pretrained=True,
        steps=0,
        batch=8,
        lr=1e-3,
        schedule="cosine",
        warmup=20,
        dtype=None,
        test_images=0,
        validation_images=validation_images,
        curve=(),
        teacher=str(teacher),
        sampled="",
    )


def train_teacher(experiment: Experiment, steps: int) -> SegmentationScores:
    """Train the teacher on fresh renders and write its weights; returns its scores on validation renders."""
    torch.manual_seed(TEACHER_SEED)
    teacher = experiment.network(TEACHER_SEED)
    train_segmentation(
        teacher,
        unlimited(experiment, TEACHER_SEED, steps),
        steps=steps,
        lr=experiment.lr,
        schedule=experiment.schedule,
        warmup=experiment.warmup,
        dtype=experiment.torch_dtype,
    )
    torch.save(teacher.state_dict(), experiment.teacher)
    validation = experiment.faces("validation", experiment.validation_images)
    return evaluate(teacher, validation, experiment.class_names, dtype=experiment.torch_dtype)


def fit_on_samples(experiment: Experiment, *, fit: FitSettings | None = None, calibration_samples: int = 2000) -> None:
    """Fit a label generator on samples of the checkpoint's generator, as DatasetGAN does; writes `experiment.sampled`.

    In DatasetGAN people label the samples (Zhang et al., CVPR 2021, section 3.2); here the teacher does. There are as
    many samples as labelled images, and they have the stream's truncation.
    """
    checkpoint = load_checkpoint(experiment.checkpoint)
    device = resolve_device(None)
    generator = checkpoint.generator.to(device)
    psi = checkpoint.truncation if experiment.truncation is None else experiment.truncation
    teacher = load_teacher(experiment)
    images, latents, labels = [], {}, []
    for index in range(experiment.labelled):
        name = f"sample-{index:02d}"
        latents[name], image = regenerate(generator, SAMPLES_SEED, index, psi)
        images.append((name, image.cpu()))
        labels.append(labels_of(teacher, image[None])[0].cpu())
    palette = FINE_PALETTE if experiment.fine else PALETTE
    found = invert(generator, images, Path(experiment.sampled).with_suffix(".latents"), given=latents)
    task = Segmentation(experiment.class_names, palette)
    fitted = replace(fit_checkpoint(generator, found, torch.stack(labels), task, fit), truncation=psi)
    save_calibrated(fitted, Path(experiment.sampled), device, calibration_samples, half=True)
