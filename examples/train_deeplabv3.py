"""Train torchvision's DeepLabV3 on an endless stream of labelled faces, then score it on faces it has never seen.

    python examples/train_deeplabv3.py --steps 300

An ordinary training script; the one line that differs from training on files is the dataset.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models.segmentation import (
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
)
from torchvision.transforms.v2.functional import normalize

from handsoff_stream import HandsOffStream
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces

MODELS = {
    "mobilenet": deeplabv3_mobilenet_v3_large,
    "resnet50": deeplabv3_resnet50,
    "resnet101": deeplabv3_resnet101,
}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
parser.add_argument("--model", choices=MODELS, default="mobilenet")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--test-images", type=int, default=200)
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

# dataset = SegmentationFolder("faces/train", transforms=...)
dataset = HandsOffStream("faces")
loader = DataLoader(dataset, batch_size=8)

model = MODELS[args.model](weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES)).to(device)
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 0.1  # MobileNetV3's 0.01 is too slow for a short training from random weights
optimizer = torch.optim.Adam(model.parameters(), args.lr)

model.train()
for step, (images, labels) in enumerate(loader, start=1):
    images, labels = images.to(device), labels.to(device)
    logits = model(normalize(images, IMAGENET_MEAN, IMAGENET_STD))["out"]
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}/{args.steps}  loss {loss.item():.3f}", flush=True)
    if step == args.steps:
        break

model.eval()
iou = MulticlassJaccardIndex(len(CLASS_NAMES), average="none").to(device)
test_set = RenderedFaces("test", num_images=args.test_images)
with torch.inference_mode():
    for images, labels in DataLoader(test_set, batch_size=8):
        images, labels = images.to(device), labels.to(device)
        logits = model(normalize(images, IMAGENET_MEAN, IMAGENET_STD))["out"]
        iou.update(logits.argmax(dim=1), labels)

scores = iou.compute()
for name, score in zip(CLASS_NAMES, scores.tolist(), strict=True):
    print(f"{name:12} {score:.3f}")
print(f"{'mIoU':12} {scores.mean().item():.3f}")
