"""The offline half: labelled images and a generator => a checkpoint to stream from, in three calls.

    latents = invert(generator, images, folder)                        # the latent of each image
    checkpoint = fit_checkpoint(generator, latents, labels, task)      # a label generator, learned from feature maps
    checkpoint = calibrate(checkpoint)                                 # image scores, from which a filter starts

`from_files` composes them for images and masks on disk. Where there are no labelled images, samples of the generator
can be annotated (`write_samples`); beside labelled images, a segmentation network can label samples (`Teacher`).
Nothing here is needed once the checkpoint is written.
"""

from handsoff_stream.fitting.annotation.sample import write_samples
from handsoff_stream.fitting.augment import AugmentationSettings, with_augmentations
from handsoff_stream.fitting.calibration import calibrate
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode_images
from handsoff_stream.fitting.encoder.train import EncoderSettings, train_encoder
from handsoff_stream.fitting.feature_table import FeatureTable
from handsoff_stream.fitting.fit import FitReport, FitSettings, fit_checkpoint, fit_label_generator
from handsoff_stream.fitting.inversion.descent import Inversion, InversionSettings, invert_batch
from handsoff_stream.fitting.inversion.latents import FoundLatents, LatentSpace, invert, read_latent
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.fitting.inversion.store import invert_images
from handsoff_stream.fitting.labelled_samples import LabelledSamples, SampleSettings, label_samples
from handsoff_stream.fitting.teacher import Teacher, TeacherSettings, mean_probabilities, train_teacher

__all__ = [
    "AugmentationSettings",
    "EncoderSettings",
    "FeatureTable",
    "FitReport",
    "FitSettings",
    "FoundLatents",
    "Inversion",
    "InversionSettings",
    "LabelledSamples",
    "LatentSpace",
    "Perceptual",
    "SampleSettings",
    "Teacher",
    "TeacherSettings",
    "calibrate",
    "encode_images",
    "fit_checkpoint",
    "fit_label_generator",
    "invert",
    "invert_batch",
    "invert_images",
    "label_samples",
    "load_perceptual",
    "load_restyle",
    "mean_probabilities",
    "read_latent",
    "train_encoder",
    "train_teacher",
    "with_augmentations",
    "write_samples",
]
