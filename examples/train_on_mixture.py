"""Train DeepLabV3 on batches of which half are samples of a stream and half are your own labelled images.

    python examples/train_on_mixture.py
    python examples/train_on_mixture.py --checkpoint mine.safetensors --images photos/ --labels masks/ \
        --class-map celebamask_hq_8 --out deeplab.pt

The first command takes the faces and the 16 labelled images that their checkpoint was fitted to.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from handsoff_stream import HandsOffStream, mix
from handsoff_stream.config import load_class_map
from handsoff_stream.datasets.labelled_images import Geometry, LabelledImages, list_labelled
from handsoff_stream.datasets.rendered_faces import RenderedFaces, labelled_faces
from handsoff_stream.downstream import build_deeplab, ordinary_augmentation
from handsoff_stream.outlets.loader import HandsOffLoader

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", default="faces")
parser.add_argument("--images", type=Path, help="folder of labelled images")
parser.add_argument("--labels", type=Path, help="folder of their masks")
parser.add_argument("--class-map", help="that the checkpoint was fitted with: a name or a YAML file")
parser.add_argument("--share", type=float, default=0.5, help="of labelled images in each batch")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--num-workers", type=int, default=0, help="processes that make batches, on a CPU")
parser.add_argument("--out", type=Path, default=Path("deeplab.pt"))
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

augmentation = ordinary_augmentation()
stream = HandsOffStream(args.checkpoint, batch_size=args.batch_size, transforms=augmentation)
labelled: LabelledImages | RenderedFaces = labelled_faces(16)
if args.images is not None:
    listing, geometry = list_labelled(args.images, args.labels), Geometry(stream.size, resize="crop")
    labelled = LabelledImages(listing, load_class_map(args.class_map), geometry)
loader = HandsOffLoader(mix(stream, labelled, args.share, transforms=augmentation), num_workers=args.num_workers)

model = build_deeplab(len(stream.class_names), backbone="resnet18").to(device).train()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for step, batch in zip(range(1, args.steps + 1), loader, strict=False):
    logits = model(batch.images.to(device))
    loss = F.cross_entropy(logits, batch.labels.to(device), ignore_index=255)  # 255: unlabelled pixels
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == args.steps:
        shown = int((batch.indices < 0).sum())  # samples of the stream have an index of 0 or more
        print(f"step {step}/{args.steps}  loss {loss.item():.3f}  {shown} of {len(batch)} labelled", flush=True)
torch.save(model.state_dict(), args.out)
