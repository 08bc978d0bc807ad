"""Endless labelled images from a StyleGAN2 and at most 50 labelled ones, synthesized while you train.

    from torch.utils.data import DataLoader
    from handsoff_stream import HandsOffStream

    loader = DataLoader(HandsOffStream("faces"), batch_size=8)

This façade is the whole public surface of the online half. Fitting a checkpoint of your own is
`handsoff_stream.fitting`, the DeepLabV3 loop `handsoff_stream.downstream`; both need optional packages.
"""

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from handsoff_stream.errors import CheckpointError, StreamError
from handsoff_stream.filters import BlockQuantile, RollingPercentile, Threshold
from handsoff_stream.generators import load_generator
from handsoff_stream.mixture import mix
from handsoff_stream.position.state import merge_states
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream

__version__ = "0.1.0"

__all__ = [
    "BlockQuantile",
    "Checkpoint",
    "CheckpointError",
    "HandsOffStream",
    "LabelledBatch",
    "RollingPercentile",
    "Shard",
    "StreamError",
    "Threshold",
    "load_checkpoint",
    "load_generator",
    "merge_states",
    "mix",
    "save_checkpoint",
]
