"""Train torchvision's DeepLabV3 on an endless stream of labelled faces, then score it on held-out rendered faces.

    python examples/train_deeplabv3.py --steps 300

This is an ordinary training script: only the line that makes the dataset differs from training on files.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models import get_model
from torchvision.transforms.v2.functional import normalize

from handsoff_stream import HandsOffStream
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="deeplabv3_mobilenet_v3_large", help="a segmentation model of torchvision")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--test-images", type=int, default=200)
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

dataset = HandsOffStream("faces")  # instead of SegmentationFolder("faces/train")
loader = DataLoader(dataset, batch_size=args.batch_size)

model = get_model(args.model, weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES)).to(device)
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 0.1  # MobileNetV3's 0.01 is too slow for a short training from random weights
optimizer = torch.optim.Adam(model.parameters(), args.lr)

model.train()
for step, (images, labels) in zip(range(1, args.steps + 1), loader, strict=False):
    logits = model(normalize(images.to(device), IMAGENET_MEAN, IMAGENET_STD))["out"]
    loss = F.cross_entropy(logits, labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}/{args.steps}  loss {loss.item():.3f}", flush=True)

model.eval()
iou = MulticlassJaccardIndex(len(CLASS_NAMES), average="none").to(device)
with torch.inference_mode():
    for images, labels in DataLoader(RenderedFaces("test", num_images=args.test_images), batch_size=8):
        logits = model(normalize(images.to(device), IMAGENET_MEAN, IMAGENET_STD))["out"]
        iou.update(logits.argmax(dim=1), labels.to(device))

scores = iou.compute()
for name, score in [*zip(CLASS_NAMES, scores.tolist(), strict=True), ("mIoU", scores.mean().item())]:
    print(f"{name:12} {score:.3f}")
