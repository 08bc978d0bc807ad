"""Mixtures: a stream whose batches also hold the user's own labelled images.

    loader = DataLoader(mix(HandsOffStream("faces", batch_size=8), labelled, share=0.5), batch_size=None)

In published results synthetic images alone teach less than real ones, and both together more; FreeMask (Yang et al.,
NeurIPS 2023) takes about as many synthetic images as real ones. In a `LabelledBatch`, and with `as_dict=True`, image n
of the labelled set has the index -1 - n and the uncertainty 0.

A saved state holds the share and a fingerprint of the labelled images, and a mixture with others refuses it. Knows
streams and datasets. Does not know how samples are made, nor what is trained on them.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypeVar

from handsoff_stream.batch import ONLY_HEAD
from handsoff_stream.companions import Companions, LabelledSet, MapStyle
from handsoff_stream.stream import HandsOffStream

T = TypeVar("T")
LARGEST_DENOMINATOR = 4096


def mix(
    stream: HandsOffStream[T],
    labelled: MapStyle,
    share: float | Fraction = 0.5,
    *,
    transforms: Callable[..., Any] | None = None,
) -> HandsOffStream[T]:
    """A stream that also hands out labelled images; `share` of what it hands out is labelled.

    If `stream` makes batches (`batch_size=n`), every batch has n rows: first the stream's, then `share * n` labelled
    images. A batch that the end of an epoch makes short keeps that proportion, rounded down. Without `batch_size`, each
    sample is followed by the labelled images that go with it, and `share` holds on average.

    The labelled images come in random orders of the whole set, one after the other. Which of them go with a sample, and
    how they are transformed, is a function of (seed, index of the sample). In batches with fewer labelled images than
    samples, the place in the batch decides whether a sample has one. What goes with a rejected sample is left out.

    Ranks, workers, `state_dict`, `set_epoch`, `take`, `skip` and `merge_states` are those of the stream, and
    `HandsOffLoader` takes a mixture, too. `epoch_size` counts samples of the stream, as before; `len` counts batches,
    or without `batch_size` samples and labelled images. `mixture[i]` is `stream[i]`, without labelled images.

    Args:
        stream: what to begin with; it is left as it is. The mixture begins where it was set to begin.
        labelled: a dataset with a length, whose samples end with (image, label), such as `LabelledImages` or a list.
            image: float32 [3, H, W] in [0, 1] or uint8 in [0, 255], of the stream's size. label: as the stream's,
            int64 [H, W] with 255 where unlabelled; float [K, H, W] for heads without classes; a dict by head if there
            are several. `labelled[n]` must be the same at every call; up to 1 GiB of them are kept in memory.
        share: of labelled images, in (0, 1); 0.5 is one for each sample of the stream.
        transforms: joint transform of a labelled image and its label, as the `transforms` of the stream, which do not
            apply to labelled images. They run where the stream's samples lie.

    Raises:
        TypeError: no stream, no dataset with a length, or samples of it that are no image and label.
        ValueError: a share outside of (0, 1), or that is no whole number of the rows of a batch; an empty set; images
            of another size or range; a stream of soft labels; ids that are no class of the stream; a stream that is a
            mixture already. At most 64 images are checked at once, the others when they are needed.
    """
    _check_stream(stream)
    exact = _exact(share)
    names = stream.class_names
    companions = Companions(
        LabelledSet(labelled, stream.size, names if isinstance(names, dict) else {ONLY_HEAD: names}),
        exact,
        seed=stream.options.seed,
        transforms=transforms,
        image_dtype=stream.assembly.image_dtype,
        device=stream.output_device,
    )
    mixture = copy.copy(stream)
    if stream.batch_size is not None:
        mixture.batch_size = stream.batch_size - _rows(exact, stream.batch_size)
    mixture.assembly = replace(stream.assembly, companions=companions)
    return mixture


def _check_stream(stream: Any) -> None:
    if not isinstance(stream, HandsOffStream):
        raise TypeError(f"stream={type(stream).__name__} has no samples by index; pass a HandsOffStream")
    if stream.assembly.companions is not None:
        raise ValueError(
            f"this stream has {stream.assembly.companions} already, and a second set would need a share of its own; "
            "pass one set that holds all images, for instance torch.utils.data.ConcatDataset"
        )
    if stream.options.labels == "soft":
        raise ValueError(
            'labels="soft" are probabilities and labelled images have class ids, which make no batch together; build '
            'the stream with labels="hard"'
        )


def _exact(share: float | Fraction) -> Fraction:
    if not isinstance(share, int | float | Fraction) or not 0 < share < 1:
        raise ValueError(
            f"share={share!r} is no mixture of both; pass a number between 0 and 1, 0.5 is usual, and use the stream "
            "or the labelled images alone without `mix`"
        )
    exact = Fraction(share).limit_denominator(LARGEST_DENOMINATOR)
    if not 0 < exact < 1:
        raise ValueError(f"share={share!r} is too close to {exact}; pass at least 1/{LARGEST_DENOMINATOR} of either")
    return exact


def _rows(share: Fraction, batch_size: int) -> int:
    """Labelled images in a batch."""
    rows = share * batch_size
    if batch_size == 1:
        raise ValueError("batch_size=1 has no row for both; build the stream with a larger one, or with none")
    if rows.denominator != 1:
        nearest = min(max(round(rows), 1), batch_size - 1)
        raise ValueError(
            f"share={float(share):.6g} of batch_size={batch_size} would be {float(rows):.6g} labelled images per "
            f"batch, and a batch holds whole ones; pass a share of k/{batch_size} with k from 1 to {batch_size - 1}, "
            f"the nearest is {nearest}/{batch_size} = {nearest / batch_size:.6g}, or another batch_size"
        )
    return int(rows)
