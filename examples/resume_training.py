"""Train in several runs: each continues with the batch after the last one that the run before it trained on.

    python examples/resume_training.py training.pt --steps 100     # the first run
    python examples/resume_training.py training.pt --steps 100     # continues after step 100

torchdata's StatefulDataLoader keeps the state of the stream beside those of the model and the optimizer.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from handsoff_stream import HandsOffStream
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", type=Path, help="state of the training; read if it exists, written at the end")
parser.add_argument("--steps", type=int, default=100, help="of this run")
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

stream = HandsOffStream("faces", batch_size=args.batch_size)
loader = StatefulDataLoader(stream, batch_size=None)  # the stream makes whole batches
model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES)).to(device)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)

if args.file.exists():
    saved = torch.load(args.file, map_location=device, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(saved["loader"])

model.train()
for _, batch in zip(range(args.steps), loader, strict=False):
    loss = F.cross_entropy(model(batch.images.to(device))["out"], batch.labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"samples {batch.indices.tolist()}  loss {loss.item():.3f}", flush=True)

state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
unfinished = args.file.with_suffix(".unfinished")
torch.save(state, unfinished)
unfinished.replace(args.file)  # the file is whole at any time
