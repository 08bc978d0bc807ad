"""Training a segmentation network on the stream, and measuring how well it segments."""

from handsoff_stream.downstream.deeplab import build_deeplab
from handsoff_stream.downstream.metrics import SegmentationMeter, SegmentationScores
from handsoff_stream.downstream.repeated import RepeatedAugmented, ordinary_augmentation
from handsoff_stream.downstream.training import TrainingReport, evaluate, train_segmentation

__all__ = [
    "RepeatedAugmented",
    "SegmentationMeter",
    "SegmentationScores",
    "TrainingReport",
    "build_deeplab",
    "evaluate",
    "ordinary_augmentation",
    "train_segmentation",
]
