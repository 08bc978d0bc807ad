"""A teacher: segmentation networks that learn the labelled images in image space, and then label samples.

Labels through inversion lose what inversion loses, such as glasses and hats. A network with ImageNet features learns
those from a few real images and finds them in samples, whose latents are known. Either an ensemble of such networks is
trained here, or a network of the user's own labels the samples. Knows how networks are trained, read and averaged. Does
not know how the label generator learns from their labels.

Shape letters: N images, B batch, K classes, H W label size.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from handsoff_stream.checkpoint import DEFAULT_TRUNCATION
from handsoff_stream.datasets.labelled_images import LabelledImages
from handsoff_stream.fitting.labelled_samples import LabelledSamples, Predict, SampleSettings, at_size, label_samples
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Rectangle, Size
from handsoff_stream.progress import progress_bar
from handsoff_stream.provenance import sha256

WARMUP = 20  # steps


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """How the ensemble is trained. The defaults take some minutes for images of 128 x 128 on a CPU core.

    Raises:
        ValueError: a setting out of its range.
    """

    members: int = 3
    """Networks, which differ in their heads, in the order of the images and in their augmentations."""
    steps: int = 300
    """Optimizer steps of each network."""
    batch_size: int = 8
    learning_rate: float = 1e-3
    backbone: str = "efficientnet-lite0"
    """See `build_deeplab`; it starts from ImageNet weights."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.members < 1 or self.steps < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise ValueError(
                f"members={self.members}, steps={self.steps}, batch_size={self.batch_size}, "
                f"learning_rate={self.learning_rate}: pass at least 1 member and step, batches of 2 images or more "
                "(BatchNorm), and a positive rate"
            )


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Which network labels which samples."""

    samples: SampleSettings = SampleSettings()
    training: TeacherSettings = TeacherSettings()
    """Not used with a network of the user's own."""
    network: Path | Callable[[Tensor], Tensor] | None = None
    """Instead of the ensemble: a file that `handsoff-stream train` has written, or a function from images float32
    [B, 3, H, W] in [0, 1] to class probabilities [B, K, H, W]; see `mean_probabilities` for networks with logits."""

    def check(self, num_classes: int, size: Size) -> None:
        """Find out before any work whether networks can be built or read, and take images of this size.

        Raises:
            CheckpointError: a file that is no segmentation network for so many classes.
            FileNotFoundError: the ImageNet weights are missing.
            ValueError: an unknown backbone, or a size that it cannot take.
        """
        if self.network is None:
            predict = mean_probabilities([_new_network(num_classes, self.training, 0)])
        else:
            predict = self._given(num_classes, torch.device("cpu"))
        with torch.no_grad():
            predict(torch.zeros(1, 3, *size))

    def label(
        self,
        generator: Generator,
        images: Sequence[Tensor],
        masks: Tensor,
        class_names: Sequence[str],
        *,
        truncation: float,
        covered: Rectangle | None = None,
        progress: bool = False,
    ) -> LabelledSamples:
        """Train the ensemble, unless there is a network of the user's own, and label samples.

        Args:
            generator: of the samples; its device does the work.
            images: float32 [3, H', W'] in [0, 1], the labelled ones; they are resized to the labels' size.
            masks: int64 [N, H, W], with `IGNORE_INDEX` where a pixel has no label.
            class_names: the position is the id.
            truncation: psi of the samples.
            covered: see `label_samples`.
            progress: show bars.

        Raises:
            ValueError: as `label_samples`.
        """
        device = generator.w_avg.device
        size = (masks.shape[1], masks.shape[2])
        about: dict[str, Any]
        if self.network is None:
            networks = train_teacher(images, masks, class_names, self.training, device=device, progress=progress)
            predict, about = mean_probabilities(networks), {"teacher": asdict(self.training)}
        else:
            predict = self._given(len(class_names), device)
            about = {"teacher": {self.network.name: sha256(self.network)} if isinstance(self.network, Path) else {}}
        found = label_samples(
            generator,
            predict,
            len(class_names),
            size,
            self.samples,
            truncation=truncation,
            covered=covered,
            progress=progress,
        )
        return LabelledSamples(found.w_plus, found.targets, found.labelled_share, found.provenance | about)

    def label_for(self, generator: Generator, labelled: LabelledImages) -> LabelledSamples:
        """`label` from labelled images as they are, without augmentations, with the default truncation of a stream.

        Raises:
            ValueError: as `label_samples`.
        """
        images, masks = zip(*((image, mask) for _, image, mask in labelled), strict=True)
        return self.label(
            generator,
            images,
            torch.stack(masks),
            labelled.class_map.class_names,
            truncation=DEFAULT_TRUNCATION,
            covered=labelled.covered,
            progress=True,
        )

    def _given(self, num_classes: int, device: torch.device) -> Predict:
        """The user's own network."""
        from handsoff_stream.downstream.deeplab import load_deeplab

        assert self.network is not None
        if not isinstance(self.network, Path):
            return self.network
        return mean_probabilities([load_deeplab(self.network, num_classes).to(device)])


def mean_probabilities(networks: Sequence[nn.Module]) -> Predict:
    """The mean of the class probabilities of networks whose outputs are logits [B, K, H, W]; in evaluation mode."""
    for network in networks:
        network.eval()

    def predict(images_B3HW: Tensor) -> Tensor:
        return torch.stack([network(images_B3HW).float().softmax(dim=1) for network in networks]).mean(dim=0)

    return predict


def train_teacher(
    images: Sequence[Tensor],
    masks: Tensor,
    class_names: Sequence[str],
    settings: TeacherSettings | None = None,
    *,
    device: torch.device,
    progress: bool = False,
) -> list[nn.Module]:
    """Fine-tune networks on a few labelled images with ordinary augmentation; the same seed gives the same networks.

    Args:
        images: float32 [3, H', W'] in [0, 1]; they are resized to the labels' size.
        masks: int64 [N, H, W].
        class_names: the position is the id; see `ordinary_augmentation` for names of sides.
        settings: how.
        device: where to train.
        progress: show a bar.

    Returns:
        Networks from images [B, 3, H, W] in [0, 1] to logits [B, K, H, W], in evaluation mode.
    """
    from handsoff_stream.downstream import RepeatedAugmented, ordinary_augmentation, train_segmentation

    settings = settings or TeacherSettings()
    size = (masks.shape[1], masks.shape[2])
    labelled = TensorDataset(torch.cat([at_size(image[None], size) for image in images]), masks)
    networks: list[nn.Module] = []
    with progress_bar("Training a teacher", settings.members * settings.steps, show=progress) as update:
        for member in range(settings.members):
            network = _new_network(len(class_names), settings, member)
            repeated = RepeatedAugmented(
                labelled,
                length=settings.steps * settings.batch_size,
                seed=settings.seed + member,
                transforms=ordinary_augmentation(class_names),
            )

            def show(step: int, loss: float, done: int = member * settings.steps) -> None:
                update(done + step, f"loss {loss:.3f}")

            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(settings.seed + member)  # dropout, and the order of the images
                train_segmentation(
                    network,
                    DataLoader(repeated, batch_size=settings.batch_size, shuffle=True),
                    steps=settings.steps,
                    lr=settings.learning_rate,
                    schedule="cosine",
                    warmup=min(WARMUP, settings.steps // 2),
                    device=device,
                    progress=show,
                )
            networks.append(network.eval().requires_grad_(False))
    return networks


def _new_network(num_classes: int, settings: TeacherSettings, member: int) -> nn.Module:
    from handsoff_stream.downstream import build_deeplab

    return build_deeplab(num_classes, backbone=settings.backbone, pretrained_backbone=True, seed=settings.seed + member)
