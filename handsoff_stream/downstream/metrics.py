"""Segmentation scores over a whole set of images: IoU of each class, their mean, and pixel accuracy.

Counts are summed over the set before any division, so the size of the batches changes nothing. Knows class ids and
names. Does not know networks or images; predictions and labels are compared on the device where they are.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.errors import printable


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of one set of images, all in [0, 1]."""

    miou: float
    """Mean of `iou_per_class` over the classes that occur."""
    iou_per_class: tuple[float, ...]
    """Intersection over union; NaN for a class that is neither in the labels nor predicted."""
    pixel_accuracy: float
    """Share of labelled pixels whose class is predicted correctly."""
    class_names: tuple[str, ...]
    """Name of each class; the position is the id."""
    num_images: int
    """Number of images that were scored."""

    def table(self, title: str = "IoU") -> Table:
        """A rich table with one row per class and the mean below."""
        table = Table("class", "IoU", title=title, show_footer=True)
        table.columns[0].footer = f"mean ({self.num_images} images)"
        table.columns[1].footer = f"{self.miou:.4f}"
        table.columns[1].justify = "right"
        for name, iou in zip(self.class_names, self.iou_per_class, strict=True):
            table.add_row(Text(printable(name)), "absent" if iou != iou else f"{iou:.4f}")
        return table

    def record(self) -> dict[str, Any]:
        """The scores as JSON-able values; the IoU of an absent class is None."""
        ious = [None if iou != iou else iou for iou in self.iou_per_class]
        names = list(self.class_names)
        return asdict(self) | {"iou_per_class": dict(zip(names, ious, strict=True)), "class_names": names}


class SegmentationMeter:
    """Collects predictions and labels, batch by batch.

    Args:
        class_names: name of each class; the position is the id.
        device: where the batches will lie.
        ignore_index: label of pixels that do not count.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        device: str | torch.device = "cpu",
        ignore_index: int = IGNORE_INDEX,
    ):
        self.class_names = tuple(class_names)
        self.num_images = 0
        self._jaccard = MulticlassJaccardIndex(
            len(self.class_names), average="none", ignore_index=ignore_index, validate_args=False
        ).to(device)

    def update(self, predicted_BHW: Tensor, labels_BHW: Tensor) -> None:
        """Count one batch; both int64 [B, H, W]."""
        self._jaccard.update(predicted_BHW, labels_BHW)
        self.num_images += len(labels_BHW)

    def compute(self) -> SegmentationScores:
        """Scores of everything counted so far.

        Raises:
            ValueError: no labelled pixel was counted.
        """
        confusion_KK: Tensor = self._jaccard.confmat
        if not confusion_KK.sum():
            raise ValueError(
                f"{self.num_images} images without one labelled pixel have no IoU; evaluate on images with labels"
            )
        absent_K = (confusion_KK.sum(dim=0) + confusion_KK.sum(dim=1)) == 0
        iou_K = self._jaccard.compute().masked_fill(absent_K, torch.nan)  # where torchmetrics returns 0
        return SegmentationScores(
            miou=float(iou_K.nanmean()),
            iou_per_class=tuple(iou_K.tolist()),
            pixel_accuracy=float(confusion_KK.diagonal().sum() / confusion_KK.sum()),
            class_names=self.class_names,
            num_images=self.num_images,
        )
