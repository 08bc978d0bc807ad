"""Options of a stream: transforms, what is refused and when, and the default filter on a real ensemble."""

import copy
import itertools

import pytest
import torch
from conftest import assert_same, take

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.errors import CheckpointError, StreamError
from handsoff_stream.stream import HandsOffStream

# Transforms ----------------------------------------------------------------------------------------------------


def test_transforms_move_image_and_mask_together_and_belong_to_the_index(checkpoint):
    from torchvision.transforms import v2

    transforms = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(12)])
    plain = HandsOffStream(checkpoint, device="cpu", filter=None)
    stream = HandsOffStream(checkpoint, device="cpu", filter=None, transforms=transforms)
    flipped = 0
    for index, (image, mask) in enumerate(take(stream, 20)):
        assert image.shape == (3, 12, 12) and mask.shape == (12, 12) and mask.dtype == torch.int64
        assert type(image) is type(mask) is torch.Tensor
        assert_same((image, mask), stream[index])
        whole, labels = plain[index]
        flips = [(whole, labels), (whole.flip(2), labels.flip(1))]
        matches = [
            (f, y, x)
            for f, (w, m) in enumerate(flips)
            for y, x in itertools.product(range(5), repeat=2)
            if torch.equal(w[:, y : y + 12, x : x + 12], image) and torch.equal(m[y : y + 12, x : x + 12], mask)
        ]
        assert matches
        flipped += matches[0][0]
    assert 0 < flipped < 20


# Bad input -----------------------------------------------------------------------------------------------------


def test_nan_weights_are_reported_by_index_instead_of_labelling_garbage(checkpoint):
    broken = copy.deepcopy(checkpoint)
    broken.heads["segmentation"].label_generator.linear1.weight.fill_(float("nan"))
    with pytest.raises(StreamError, match="sample 0 has the uncertainty nan"):
        next(iter(HandsOffStream(broken, device="cpu")))


def test_a_checkpoint_without_a_head_is_refused_when_the_stream_is_built(checkpoint):
    with pytest.raises(CheckpointError, match="no labelling head.*handsoff-stream fit"):
        HandsOffStream(Checkpoint(checkpoint.generator))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 yields nothing"),
        ({"epoch_size": -1}, "epoch_size=-1 yields nothing"),
        ({"chunk_size": 0}, "chunk_size=0 yields nothing"),
        ({"truncation": 3.0}, "truncation=3.0 is no psi"),
        ({"noise": "loud"}, "noise='loud' is unknown"),
        ({"score": "max"}, "score='max' is unknown"),
        ({"precision": "double"}, "precision='double' is unknown"),
        ({"filter": "sorted"}, "filter='sorted' is unknown"),
        ({"seed": -1}, "seed=-1 addresses no stream"),
    ],
)
def test_an_option_out_of_range_is_refused_when_the_stream_is_built(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        HandsOffStream(checkpoint, device="cpu", **options)


def test_an_unknown_option_is_refused(checkpoint):
    with pytest.raises(TypeError, match="trucation"):
        HandsOffStream(checkpoint, trucation=0.5)


@pytest.mark.parametrize("index", [-1, 2**63])
def test_an_index_without_a_sample_is_an_index_error(checkpoint, index):
    with pytest.raises(IndexError, match="addresses no sample"):
        HandsOffStream(checkpoint, device="cpu")[index]


# The default filter on a real ensemble -------------------------------------------------------------------------


def test_the_rolling_filter_agrees_with_dropping_the_top_tenth_of_5000_samples_offline(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", filter=None, batch_size=500, chunk_size=250, epoch_size=5000)
    scores = torch.cat([batch.uncertainty for batch in stream])
    offline = torch.zeros(5000, dtype=torch.bool)
    offline[scores.argsort()[:4500]] = True

    rolling = HandsOffStream(checkpoint, device="cpu", batch_size=1, chunk_size=250)
    below = itertools.takewhile(lambda b: int(b.indices[0]) < 5000, rolling)
    kept = torch.zeros(5000, dtype=torch.bool)
    kept[[int(b.indices[0]) for b in below]] = True
    assert abs(kept.float().mean() - 0.9) <= 0.02
    assert (kept == offline).float().mean() >= 0.95
