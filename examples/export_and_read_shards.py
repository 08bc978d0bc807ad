"""Export a part of the stream to WebDataset shards, then read the shards with webdataset alone.

    python examples/export_and_read_shards.py shards --num 1000

An interrupted export continues where it stopped when the command is given again.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from handsoff_stream import HandsOffStream
from handsoff_stream.outlets.webdataset import write_shards

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--num", type=int, default=1000, help="samples")
parser.add_argument("--shard-size", type=int, default=500, help="samples per shard")
args = parser.parse_args()


def decode(files: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image, float32 [3, H, W] in [0, 1], and label, int64 [H, W], of one sample: the tensors that were streamed."""
    pixels, classes = (np.array(Image.open(io.BytesIO(files[name]))) for name in ("image.png", "label.png"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, torch.from_numpy(classes).long()


stream = HandsOffStream("faces", batch_size=16)
shards = write_shards(stream, args.folder, num_samples=args.num, shard_size=args.shard_size)
print(f"wrote {len(shards)} shards to {args.folder}")

samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).map(decode)
total = 0
for images, _ in DataLoader(samples, batch_size=16):
    total += len(images)
print(f"read {total} samples of {images.shape[2]} x {images.shape[3]} pixels")
