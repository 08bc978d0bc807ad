"""Statistics of a stream, as numbers for TensorBoard, Weights & Biases or any other logger.

    meter = StreamMeter(loader)
    for step, batch in enumerate(loader):
        meter.update(batch)
        if step % 50 == 49:
            for name, value in meter.values().items():
                writer.add_scalar(name, value, step)        # or: wandb.log(meter.values(), step=step)

Knows loaders and batches. Does not know loggers.
"""

import time
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.batch import ONLY_HEAD, LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader


class StreamMeter:
    """Speed, acceptance, uncertainty and class shares since the last call of `values`.

    Args:
        loader: the loader whose batches are counted; its stream makes batches (`batch_size=n`).
    """

    def __init__(self, loader: HandsOffLoader[Any]) -> None:
        self._loader = loader
        names = loader.stream.class_names
        self._names = names if isinstance(names, dict) else {ONLY_HEAD: names}
        self._start()

    def _start(self) -> None:
        self._began = time.perf_counter()
        self._pairs = 0
        self._largest: Tensor | None = None
        self._pixels: dict[str, Tensor] = {}

    def update(self, batch: LabelledBatch) -> None:
        """Count a batch, without waiting for the device."""
        self._pairs += len(batch)
        largest = batch.uncertainty.max()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        labels = batch.labels if isinstance(batch.labels, dict) else {ONLY_HEAD: batch.labels}
        for head, names in self._names.items():
            if names:
                label = labels[head]
                soft = label.is_floating_point()  # class probabilities, whose sum is a number of pixels
                counts = [label[:, one].sum() if soft else (label == one).sum() for one in range(len(names))]
                pixels = torch.stack(counts)
                self._pixels[head] = self._pixels.get(head, 0) + pixels

    def values(self) -> dict[str, float]:
        """Numbers by name, and start a new interval.

        stream/pairs_per_second: of this rank. stream/acceptance: share of samples that the filter kept, in this pass of
        this rank. stream/largest_uncertainty: of all samples; the filter's threshold is not below it.
        stream/share/<class> or stream/share/<head>/<class>: share of labelled pixels, for heads with classes.
        """
        seconds = time.perf_counter() - self._began
        values = {"stream/pairs_per_second": self._pairs / seconds}
        walk = self._loader.state_dict()["walk"]
        counts = walk["counts"] if walk else {"accepted": 0, "rejected": 0}
        if decided := counts["accepted"] + counts["rejected"]:
            values["stream/acceptance"] = counts["accepted"] / decided
        if self._largest is not None:
            values["stream/largest_uncertainty"] = float(self._largest)
        for head, pixels in self._pixels.items():
            total = max(int(pixels.sum()), 1)
            prefix = "stream/share/" + (f"{head}/" if head else "")
            values |= {prefix + name: int(n) / total for name, n in zip(self._names[head], pixels, strict=True)}
        self._start()
        return values
