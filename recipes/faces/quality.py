"""How good a generator of rendered faces is: kernel distance, precision and recall, shares of rare attributes.

All measures use a *teacher*, a U-Net that is trained to segment fresh renders. Its encoder starts from random weights:
ImageNet features would favor a generator that was trained with heads on them. Published figures use other features, so
these numbers only compare generators of this domain with each other and with other renders. Labels of renders are used
for measuring only; the generator is never trained on them.

Knows images in [0, 1], features and masks. Does not know generators, training or files other than the teacher's.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.kid import poly_mmd

from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import train_segmentation
from handsoff_stream.files.tensors import read_tensors, write_tensors
from handsoff_stream.progress import progress_bar

LONG_TAIL = ("glasses", "hat")
TEACHER_SIZE = 64
MIN_PIXELS = 5
"""An image shows a class if at least this many of its TEACHER_SIZE^2 pixels have it."""
NEIGHBORS = 3
TEACHER_KEY = "handsoff_stream_teacher"
TEACHER_START = 2**20
"""The teacher is trained on renders of the validation split from this index on; earlier ones serve as reference."""


class Teacher(nn.Module):
    """Images float32 [B, 3, H, W] in [0, 1] => logits float32 [B, K, TEACHER_SIZE, TEACHER_SIZE].

    K is the number of classes of the rendered faces. Images of any size are scaled to TEACHER_SIZE first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = smp.Unet(
            "resnet18", encoder_weights=None, decoder_channels=(128, 64, 32, 16, 16), classes=len(CLASS_NAMES)
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits float32 [B, K, TEACHER_SIZE, TEACHER_SIZE]."""
        logits: Tensor = self.network(shrink(images_BCHW) * 2 - 1)
        return logits

    def look(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(features float32 [B, 2048], the encoder's deepest map; predicted classes int64 [B, h, w])."""
        maps = self.network.encoder(shrink(images_BCHW) * 2 - 1)
        logits = self.network.segmentation_head(self.network.decoder(maps))
        return maps[-1].flatten(1), logits.argmax(dim=1)


def shrink(images_BCHW: Tensor) -> Tensor:
    """Images [B, 3, H, W] averaged down to [B, 3, TEACHER_SIZE, TEACHER_SIZE]."""
    return F.adaptive_avg_pool2d(images_BCHW, TEACHER_SIZE)


def train_teacher(steps: int, device: torch.device, *, varied: bool) -> Teacher:
    """A teacher trained on `8 * steps` renders, a third of them with glasses and a third with hats."""
    torch.manual_seed(0)
    renders = RenderedFaces(
        "validation", num_images=TEACHER_START + 8 * steps, size=TEACHER_SIZE, glasses=1 / 3, hat=1 / 3, varied=varied
    )
    fresh = torch.utils.data.Subset(renders, range(TEACHER_START, len(renders)))
    teacher = Teacher()
    with progress_bar("training the teacher", steps) as update:
        train_segmentation(
            teacher,
            DataLoader(fresh, batch_size=8),
            steps=steps,
            lr=3e-3,
            schedule="cosine",
            warmup=20,
            device=device,
            progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    return teacher.eval().requires_grad_(False)


def open_teacher(path: Path | None, steps: int, device: torch.device, *, varied: bool) -> Teacher:
    """The teacher in the file `path`; if there is no such file, a new teacher is trained and written there."""
    if path is None or not path.exists():
        teacher = train_teacher(steps, device, varied=varied)
        if path is not None:
            write_tensors(path, teacher.state_dict(), key=TEACHER_KEY, manifest={"steps": steps, "varied": varied})
        return teacher
    teacher = Teacher()
    teacher.load_state_dict(read_tensors(path, None)[1])
    return teacher.to(device).eval().requires_grad_(False)


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
    """Share of the images that lie near a real one in feature space."""
    recall: float
    """Share of the real images that lie near one of these; dropped modes lower it."""
    shares: dict[str, float]
    """Attribute of LONG_TAIL => share of the images on which the teacher sees it."""

    def row(self) -> dict[str, float]:
        """All numbers in one rounded dictionary, for a line of a log."""
        flat = asdict(self)
        flat |= flat.pop("shares")
        return {name: round(value, 4) for name, value in flat.items()}


@torch.inference_mode()
def look_at(batches: Iterable[Tensor], teacher: Teacher) -> tuple[Tensor, dict[str, float]]:
    """(features float32 [N, D] of all images; attribute of LONG_TAIL => share of images where the teacher sees it)."""
    features, seen = [], []
    for images in batches:
        maps, classes = teacher.look(images)
        features.append(maps.float())
        pixels = [(classes == CLASS_NAMES.index(name)).sum(dim=(1, 2)) for name in LONG_TAIL]
        seen.append(torch.stack(pixels, dim=1) >= MIN_PIXELS)
    shares = torch.cat(seen).float().mean(dim=0).tolist()
    return torch.cat(features), dict(zip(LONG_TAIL, shares, strict=True))


def measure(batches: Iterable[Tensor], teacher: Teacher, reference_ND: Tensor) -> Quality:
    """The quality of images, compared with the features [N, D] of as many reference renders."""
    features_ND, shares = look_at(batches, teacher)
    distance = float(poly_mmd(reference_ND, features_ND))
    return Quality(distance, *precision_and_recall(reference_ND, features_ND), shares)
