"""How far generated faces are from rendered ones, and how often they wear glasses or a hat.

    python -m benchmarks.generator --images 2000

Distance: the kernel distance of torchmetrics (Binkowski et al., "Demystifying MMD GANs", ICLR 2018), which unlike the
Frechet distance is unbiased for a few hundred images, between features of real and of generated images. The usual
Inception weights cannot be had offline and know nothing of rendered faces, so the features are those of a judge trained
here and now: a small DeepLabV3 learns to segment fresh renders, and its backbone's deepest maps, averaged over a 4 x 4
grid, are the features. Distances compare generators of this domain with each other, not with published numbers; the
distance between two disjoint sets of renders is given as the floor.

Attributes: the share of images in which the judge sees at least `MIN_PIXELS` pixels of a class, on generated and on
real images, next to the true share of the real ones. Last line of stdout: the result as JSON.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.kid import KernelInceptionDistance

from benchmarks.common import write_result
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream import load_checkpoint
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import build_deeplab, evaluate, train_segmentation
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.progress import progress_bar
from handsoff_stream.synthesizer import Synthesizer

MIN_PIXELS = 20
LONG_TAIL = ("glasses", "hat")
BATCH = 16


class BackboneFeatures(nn.Module):
    """Images [B, 3, H, W] in [0, 1] => [B, 256 * 16]: the judge's deepest maps, averaged over a 4 x 4 grid."""

    def __init__(self, judge: Any):
        super().__init__()
        self.judge = judge

    def forward(self, images_BCHW: Tensor) -> Tensor:
        normalised = (images_BCHW - self.judge.mean) / self.judge.std
        maps: Tensor = self.judge.network.backbone(normalised)["out"]
        return F.adaptive_avg_pool2d(maps, 4).flatten(1)


def train_judge(size: int, steps: int, device: torch.device) -> nn.Module:
    """A DeepLabV3 that has seen `8 * steps` fresh renders of the validation split, glasses and hats at one third."""
    torch.manual_seed(0)  # dropout of the judge's head
    faces = RenderedFaces("validation", num_images=8 * steps, size=size, glasses=1 / 3, hat=1 / 3)
    judge = build_deeplab(len(CLASS_NAMES), backbone="resnet18")
    with progress_bar("training the judge", steps) as update:
        train_segmentation(
            judge,
            DataLoader(faces, batch_size=8),
            steps=steps,
            lr=3e-3,
            schedule="cosine",
            warmup=20,
            device=device,
            dtype=torch.bfloat16,
            progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    return judge.eval()


def generated(synthesizer: Synthesizer, count: int) -> Iterator[Tensor]:
    for start in range(0, count, BATCH):
        yield synthesizer.generate(range(start, min(start + BATCH, count)))[0]


def rendered(split: str, size: int, count: int, device: torch.device) -> Iterator[Tensor]:
    for images, _ in DataLoader(RenderedFaces(split, num_images=count, size=size), batch_size=BATCH):
        yield images.to(device)


@torch.inference_mode()
def measure(batches: Iterator[Tensor], judge: Any, distance: KernelInceptionDistance) -> dict[str, float]:
    """Distance to the real images that `distance` holds, and attribute shares, of one set of images."""
    distance.reset()  # forgets the generated images only, see reset_real_features
    found = dict.fromkeys(LONG_TAIL, 0)
    count = 0
    for images in batches:
        distance.update(images, real=False)
        predicted = judge(images).argmax(dim=1)
        for name in LONG_TAIL:
            pixels = (predicted == CLASS_NAMES.index(name)).sum(dim=(1, 2))
            found[name] += int((pixels >= MIN_PIXELS).sum())
        count += len(images)
    shares = {name: number / count for name, number in found.items()}
    mean, deviation = distance.compute()
    return {"distance": float(mean), "distance_std": float(deviation), **shares}


def rows(result: Result) -> list[Row]:
    """The distance of every set of images, beside that of other renders."""
    sets, floor = result["sets"], "other renders"
    return [
        Row(
            f"{name}: kernel distance to renders, {result['arguments']['images']} images",
            f"{found['distance']:.3g} ± {found['distance_std']:.2g}",
            f"{floor}: {sets[floor]['distance']:.3g}",
            None,
        )
        for name, found in sets.items()
        if name != floor
    ]


def charts(result: Result) -> list[Chart]:
    """The distance of every set of images."""
    return [Chart("kernel distance to renders", [(name, found["distance"]) for name, found in result["sets"].items()])]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="faces")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--judge-steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    device = torch.device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    size = checkpoint.size[0]
    judge = train_judge(size, args.judge_steps, device)
    scores = evaluate(judge, RenderedFaces("test", num_images=100, size=size), CLASS_NAMES, device=device)

    subset = args.images // 2
    reference = KernelInceptionDistance(
        feature=BackboneFeatures(judge), subset_size=subset, normalize=True, reset_real_features=False
    ).to(device)
    for images in rendered("generator", size, args.images, device):
        reference.update(images, real=True)

    sets = {"other renders": rendered("test", size, args.images, device)}
    for psi in (1.0, checkpoint.truncation):
        synthesizer = Synthesizer(checkpoint, SynthesisOptions(truncation=psi), device)
        sets[f"generated, psi {psi}"] = generated(synthesizer, args.images)
    results = {name: measure(batches, judge, reference) for name, batches in sets.items()}

    table = Table("images", "kernel distance", *(f"{name} seen" for name in LONG_TAIL))
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['distance']:.4f} ± {row['distance_std']:.4f}",
            *(f"{row[attribute]:.1%}" for attribute in LONG_TAIL),
        )
    Console().print(table)
    training = checkpoint.provenance.get("generator_training", checkpoint.provenance)
    record = {"arguments": vars(args), "judge_miou": scores.miou, "sets": results, "training": training}
    write_result("generator", record)


if __name__ == "__main__":
    main()
