"""What the stream is for: train DeepLabV3 on it, and measure what came of it."""

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
