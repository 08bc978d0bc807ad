"""A sheet of samples in one PNG: images, labels over images, uncertainties, and which samples a filter would reject.

Knows how to draw. Does not know how samples are made: a `Synthesizer` makes them, as in a stream.

Shape letters: B batch, H W image size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, resolve
from handsoff_stream.device import default_chunk_size, usable_device
from handsoff_stream.files.atomic import check_file, whole_file
from handsoff_stream.filters import Threshold
from handsoff_stream.isolation import isolated
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.precision import default_precision
from handsoff_stream.source import CheckpointSource
from handsoff_stream.synthesizer import Synthesizer, in_chunks
from handsoff_stream.tasks import Segmentation
from handsoff_stream.uncertainty import ScoreKind

Pixels = NDArray[np.uint8]

# From black through violet and orange to pale yellow: lightness rises evenly, so brighter means more uncertain.
HEAT_ANCHORS = (
    (0, 0, 4),
    (28, 16, 68),
    (79, 18, 123),
    (129, 37, 129),
    (181, 54, 122),
    (229, 80, 100),
    (251, 135, 97),
    (254, 194, 135),
    (252, 253, 191),
)
OPACITY = 0.6  # of the label over the image
MAX_SAMPLES = 1024  # per sheet, whose pixels are all in memory at once
TILE_SIZE = 192  # small images are enlarged to about this many pixels
GAP, MARGIN, TEXT, LINE = 4, 16, 13, 20
PAPER, INK, ACCEPTED, REJECTED = (255, 255, 255), (40, 40, 40), (90, 90, 90), (200, 30, 40)


@dataclass(frozen=True)
class PreviewSample:
    """One sample, as it is drawn."""

    index: int
    image: Pixels
    """uint8 [H, W, 3]"""
    label: NDArray[np.int64]
    """[H, W], class ids"""
    uncertainty: NDArray[np.float32]
    """[H, W], Jensen-Shannon divergence in nats"""
    score: float
    """The image's score, of the kind that was asked for."""
    kept: bool | None
    """Whether the filter keeps the sample; None if the checkpoint has no calibration scores."""


def preview_sheet(
    checkpoint: str | Path | Checkpoint,
    path: str | Path,
    *,
    num: int = 8,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    columns: int = 8,
    truncation: float | None = None,
    score: ScoreKind = "top10_mean",
    percentile: float = 90.0,
    device: str | torch.device | None = None,
) -> list[PreviewSample]:
    """Draw samples of a stream, rejected ones included, into one PNG.

    Each sample is a column of three pictures: the image, its label blended over it in the task's palette, and the
    uncertainty of each pixel, on one scale for the whole sheet. Below it are index and score; a sample whose score
    lies above the `percentile` of the checkpoint's calibration scores is marked as rejected, as a stream with
    `filter="threshold"` would reject it.

    Args:
        checkpoint: name, path or loaded checkpoint with a segmentation head.
        path: PNG to write.
        num: number of samples, which start at index 0; unused if `indices` is given.
        indices: indices of the samples.
        seed: seed of the stream.
        columns: samples per row.
        truncation: psi; None means the checkpoint's own.
        score: see `SynthesisOptions.score`.
        percentile: in (0, 100].
        device: where to synthesize; None means CUDA if there is one.

    Returns:
        The samples in the order in which they are drawn.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or has no head.
        OutputError: the PNG cannot be written; this is checked before anything is synthesized.
        ValueError: no or too many samples, no columns, or no segmentation head.
    """
    chosen = _chosen(range(num) if indices is None else list(indices), columns)
    source = CheckpointSource(checkpoint)
    psi = source.truncation if truncation is None else truncation
    where = usable_device(device)
    options = SynthesisOptions(seed=seed, truncation=psi, score=score, precision=default_precision(where))
    loaded = source.load()
    name, task = _segmentation_head(loaded)
    threshold = _threshold(source.calibration_scores(options), percentile)
    check_file(path, inputs=[] if isinstance(checkpoint, Checkpoint) else [resolve(checkpoint)])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with isolated():
        synthesizer = Synthesizer(loaded, options, where)
        samples = _synthesize(synthesizer, name, chosen, threshold)
    sheet = draw_sheet(samples, task, columns=columns)
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")
    return samples


def _chosen(indices: Sequence[int], columns: int) -> Sequence[int]:
    if not 1 <= len(indices) <= MAX_SAMPLES or columns < 1:
        raise ValueError(
            f"{len(indices)} samples in {columns} columns make no sheet; ask for at least one of each, and at most "
            f"{MAX_SAMPLES} samples"
        )
    return indices


def _segmentation_head(checkpoint: Checkpoint) -> tuple[str, Segmentation]:
    for name, head in checkpoint.heads.items():
        if isinstance(head.task, Segmentation):
            return name, head.task
    raise ValueError(
        f"none of the heads {sorted(checkpoint.heads)} is a segmentation, and a preview draws class labels; use a "
        "checkpoint with a segmentation head"
    )


def _threshold(calibration: Sequence[float], percentile: float) -> Threshold | None:
    if not calibration:
        return None
    threshold = Threshold(percentile)
    threshold.start(calibration)
    return threshold


def _synthesize(
    synthesizer: Synthesizer, head: str, indices: Sequence[int], threshold: Threshold | None
) -> list[PreviewSample]:
    """The samples, bit for bit those of a stream because the chunks are the same."""
    samples: dict[int, PreviewSample] = {}
    for chunk, rows, places in in_chunks(indices, default_chunk_size(synthesizer.device)):
        images_B3HW, features = synthesizer.generate(chunk)
        label_BHW, uncertainty_BHW = synthesizer.label(head, features)
        scores = synthesizer.score(head, label_BHW, uncertainty_BHW).tolist()
        for row, place in zip(rows, places, strict=True):
            samples[place] = PreviewSample(
                index=chunk[row],
                image=_pixels(images_B3HW[row]),
                label=label_BHW[row].cpu().numpy(),
                uncertainty=uncertainty_BHW[row].cpu().numpy(),
                score=scores[row],
                kept=None if threshold is None else threshold.push(scores[row])[0],
            )
    return [samples[place] for place in range(len(indices))]


def _pixels(image_3HW: Tensor) -> Pixels:
    return image_3HW.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


# Colors ---------------------------------------------------------------------------------------------------------


def heat_table() -> Pixels:
    """256 colors for values from 0 to 1, uint8 [256, 3], piecewise linear between `HEAT_ANCHORS`."""
    anchors = np.array(HEAT_ANCHORS, dtype=np.float64)
    position = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(position, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def heat_map(values_HW: NDArray[np.float32], top: float) -> Pixels:
    """Colors for values in [0, top], uint8 [H, W, 3]; larger values get the last color.

    Args:
        values_HW: float32, at least 0.
        top: value of the last color.
    """
    scaled = np.clip(values_HW / max(top, 1e-12), 0, 1) * 255
    return heat_table()[scaled.round().astype(np.int64)]


def overlay(image_HW3: Pixels, label_HW: NDArray[Any], palette: Sequence[tuple[int, ...]]) -> Pixels:
    """The label's colors blended over the image, uint8 [H, W, 3].

    Args:
        image_HW3: uint8.
        label_HW: class ids.
        palette: RGB color of each class, 0 to 255.
    """
    colors = np.array(palette, dtype=np.float64)[label_HW]
    return ((1 - OPACITY) * image_HW3 + OPACITY * colors).round().astype(np.uint8)


# Layout ----------------------------------------------------------------------------------------------------------


def draw_sheet(samples: Sequence[PreviewSample], task: Segmentation, *, columns: int) -> Image.Image:
    """The sheet: `columns` samples per row, each as three pictures one below the other; legend and scale at the end."""
    columns = min(columns, len(samples))
    tile_h, tile_w = _tile_size(*samples[0].label.shape)
    top = max(float(sample.uncertainty.max()) for sample in samples)
    cell_h = 3 * (tile_h + GAP) + LINE + MARGIN // 2
    width = 2 * MARGIN + columns * (tile_w + GAP) - GAP
    legend = _legend(task, width - 2 * MARGIN, top)
    rows = math.ceil(len(samples) / columns)
    sheet = Image.new("RGB", (width, 2 * MARGIN + rows * cell_h + legend.height), PAPER)
    for i, sample in enumerate(samples):
        corner = MARGIN + i % columns * (tile_w + GAP), MARGIN + i // columns * cell_h
        _draw_sample(sheet, corner, sample, task, (tile_w, tile_h), top)
    sheet.paste(legend, (MARGIN, MARGIN + rows * cell_h))
    return sheet


def _tile_size(height: int, width: int) -> tuple[int, int]:
    scale = max(1.0, TILE_SIZE / max(height, width))
    return round(height * scale), round(width * scale)


def _draw_sample(
    sheet: Image.Image,
    corner: tuple[int, int],
    sample: PreviewSample,
    task: Segmentation,
    size: tuple[int, int],
    top: float,
) -> None:
    x, y = corner
    image = Image.fromarray(sample.image).resize(size, Image.Resampling.BICUBIC)
    # Class ids, 254 at most, must not be interpolated.
    label = Image.fromarray(sample.label.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    blended = Image.fromarray(overlay(np.asarray(image), np.asarray(label), task.palette))
    heat = Image.fromarray(heat_map(sample.uncertainty, top)).resize(size, Image.Resampling.NEAREST)
    for picture in (image, blended, heat):
        sheet.paste(picture, (x, y))
        y += size[1] + GAP
    draw = ImageDraw.Draw(sheet)
    text, ink = f"#{sample.index}  {sample.score:.3g}", ACCEPTED
    if sample.kept is False:
        text, ink = f"{text}  rejected", REJECTED
        draw.rectangle((x, corner[1], x + size[0] - 1, y - GAP - 1), outline=REJECTED, width=3)
    draw.text((x + 2, y), text, fill=ink, font=_font())


def _legend(task: Segmentation, width: int, top: float) -> Image.Image:
    """Class colors with their names, wrapped to `width`, and the color scale of the uncertainty."""
    font, swatch = _font(), TEXT
    places: list[tuple[int, int]] = []
    x = y = 0
    for name in task.class_names:
        needed = swatch + 6 + math.ceil(font.getlength(name)) + 14
        if x and x + needed > width:
            x, y = 0, y + LINE
        places.append((x, y))
        x += needed
    picture = Image.new("RGB", (width, y + 2 * LINE + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    for (x, row), name, color in zip(places, task.class_names, task.palette, strict=True):
        draw.rectangle((x, row, x + swatch, row + swatch), fill=tuple(color), outline=INK)
        draw.text((x + swatch + 6, row), name, fill=INK, font=font)
    row = y + LINE + MARGIN // 2
    bar = np.broadcast_to(heat_table()[None, ::2], (swatch, 128, 3))
    picture.paste(Image.fromarray(np.ascontiguousarray(bar)), (0, row))
    draw.text((136, row), f"uncertainty, 0 to {top:.2g} nats", fill=INK, font=font)
    return picture


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)
