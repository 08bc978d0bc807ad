"""How good a generator of rendered faces is: kernel distance, precision and recall, shares of rare attributes.

All of it is seen through a *judge*, a U-Net that learns to segment fresh renders. Its encoder starts from random
weights, so its features are not those of ImageNet, which the generator may have been trained to please. Nor are they
those of published figures: numbers compare generators of this domain with each other and with other renders.
Labels of renders are used here, for measuring; the generator never sees one.

Knows images in [0, 1], features and masks. Does not know generators, training or files other than the judge's.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.kid import poly_mmd

from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import train_segmentation
from handsoff_stream.files.atomic import whole_file
from handsoff_stream.progress import progress_bar

LONG_TAIL = ("glasses", "hat")
JUDGE_SIZE = 64
MIN_PIXELS = 5
"""Of JUDGE_SIZE^2: so many pixels of a class, and the image has it."""
NEIGHBORS = 3
JUDGE_START = 2**20
"""The judge learns from renders of the validation split from here on; those before are left to be measured against."""


class Judge(nn.Module):
    """Images float32 [B, 3, H, W] in [0, 1] => logits float32 [B, K, JUDGE_SIZE, JUDGE_SIZE]."""

    def __init__(self) -> None:
        super().__init__()
        self.network = smp.Unet("resnet18", encoder_weights=None, classes=len(CLASS_NAMES))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.network(shrink(images_BCHW) * 2 - 1)
        return logits

    def look(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 [B, 2048], the encoder's deepest map; and predicted classes int64 [B, h, w]."""
        maps = self.network.encoder(shrink(images_BCHW) * 2 - 1)
        logits = self.network.segmentation_head(self.network.decoder(maps))
        return maps[-1].flatten(1), logits.argmax(dim=1)


def shrink(images_BCHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images_BCHW, JUDGE_SIZE)


def train_judge(steps: int, device: torch.device, *, varied: bool) -> Judge:
    """A judge that has seen `8 * steps` renders, a third of them with glasses and a third with hats."""
    torch.manual_seed(0)
    renders = RenderedFaces(
        "validation", num_images=JUDGE_START + 8 * steps, size=JUDGE_SIZE, glasses=1 / 3, hat=1 / 3, varied=varied
    )
    fresh = torch.utils.data.Subset(renders, range(JUDGE_START, len(renders)))
    judge = Judge()
    with progress_bar("training the judge", steps) as update:
        train_segmentation(
            judge,
            DataLoader(fresh, batch_size=8),
            steps=steps,
            lr=3e-3,
            schedule="cosine",
            warmup=20,
            device=device,
            progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    return judge.eval().requires_grad_(False)


def open_judge(path: Path | None, steps: int, device: torch.device, *, varied: bool) -> Judge:
    """The judge that `path` holds; if it does not exist, it is trained and written there."""
    if path is None or not path.exists():
        judge = train_judge(steps, device, varied=varied)
        if path is not None:
            with whole_file(path) as partial:
                save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, partial)
        return judge
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval().requires_grad_(False)


def precision_and_recall(real_ND: Tensor, generated_ND: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, equations 1 and 2), k = NEIGHBORS.

    A set's manifold is the union of balls, one around each of its points, which reach to its k-th nearest neighbor.
    Precision is the share of generated points inside the manifold of the real ones; recall is the reverse. Both depend
    on the number of points, so compare only sets of equal size.

    Raises:
        ValueError: a set has too few points to have a k-th neighbor.
    """
    if min(len(real_ND), len(generated_ND)) <= NEIGHBORS:
        raise ValueError(
            f"{len(real_ND)} real and {len(generated_ND)} generated images do not all have {NEIGHBORS} neighbors; "
            f"give at least {NEIGHBORS + 1} of each"
        )

    def covered(points_ND: Tensor, by_MD: Tensor) -> float:
        # The point itself is its own nearest neighbor.
        radius_M = torch.cdist(by_MD, by_MD).kthvalue(NEIGHBORS + 1, dim=1).values
        return float((torch.cdist(points_ND, by_MD) <= radius_M).any(dim=1).float().mean())

    return covered(generated_ND, real_ND), covered(real_ND, generated_ND)


@dataclass(frozen=True)
class Quality:
    """What was measured on one set of images."""

    distance: float
    """Kernel distance to the reference (Binkowski et al., ICLR 2018): unbiased, about 0 for another set of renders."""
    precision: float
    """Share of the images that are like a real one."""
    recall: float
    """Share of real images that are like one of these; modes that were dropped show here."""
    shares: dict[str, float]
    """Share of the images on which the judge sees each of LONG_TAIL."""

    def row(self) -> dict[str, float]:
        """Flat and rounded, for a line of a log."""
        flat = asdict(self)
        flat |= flat.pop("shares")
        return {name: round(value, 4) for name, value in flat.items()}


@torch.inference_mode()
def look_at(batches: Iterable[Tensor], judge: Judge) -> tuple[Tensor, dict[str, float]]:
    """Features [N, D] of all images, and the share of them on which the judge sees each of LONG_TAIL."""
    features, seen = [], []
    for images in batches:
        maps, classes = judge.look(images)
        features.append(maps.float())
        pixels = [(classes == CLASS_NAMES.index(name)).sum(dim=(1, 2)) for name in LONG_TAIL]
        seen.append(torch.stack(pixels, dim=1) >= MIN_PIXELS)
    shares = torch.cat(seen).float().mean(dim=0).tolist()
    return torch.cat(features), dict(zip(LONG_TAIL, shares, strict=True))


def measure(batches: Iterable[Tensor], judge: Judge, reference_ND: Tensor) -> Quality:
    """Compare images with the features of as many reference renders."""
    features_ND, shares = look_at(batches, judge)
    distance = float(poly_mmd(reference_ND, features_ND))
    return Quality(distance, *precision_and_recall(reference_ND, features_ND), shares)
