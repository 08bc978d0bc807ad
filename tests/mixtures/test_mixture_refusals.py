"""What does not fit together is refused with the value, the consequence and the remedy."""

from fractions import Fraction

import pytest
import torch
from conftest import take
from mixtures import FILTERS, SIZE, labelled_set, mixture, rows, synthesize, through_json
from torch.utils.data import Subset, TensorDataset

from handsoff_stream import mix
from handsoff_stream.position.state import merge_states
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream


def image(*shape, value=0.5):
    return torch.full(shape or (3, SIZE, SIZE), value)


LABEL = torch.zeros(SIZE, SIZE, dtype=torch.int64)


@pytest.mark.parametrize(
    ("labelled", "error", "message"),
    [
        ([], ValueError, "labelled is empty"),
        (iter(labelled_set(2)), TypeError, "labelled=list_iterator cannot be asked for its length"),
        ([image()], TypeError, r"labelled\[0\] is of type Tensor, and an image and its label are needed"),
        ([(image().numpy(), LABEL)], TypeError, r"the image of labelled\[0\] is ndarray"),
        ([(image().double(), LABEL)], TypeError, r"is torch\.float64, and the stream's are tensors in \[0, 1\]"),
        ([(image(3, 8, 8), LABEL)], ValueError, r"is \[3, 8, 8\], the stream's are \[3, 16, 16\].*resize it"),
        ([(image(1, SIZE, SIZE), LABEL)], ValueError, r"is \[1, 16, 16\], the stream's are \[3, 16, 16\]"),
        ([(image(value=-1.5), LABEL)], ValueError, "has values from -1.5 to -1.5, the stream's are in"),
        ([(image(), LABEL[:8])], ValueError, r"label of labelled\[0\] is \[8, 16\], the stream's are \[16, 16\]"),
        ([(image(), LABEL.float())], TypeError, "is torch.float32, the stream's are the ids of 3 classes"),
        ([(image(), {"a": LABEL})], ValueError, "is a, the stream's labels are one tensor"),
        ([(image(), LABEL), (image(), LABEL + 3)], ValueError, r"labelled\[1\] has the id 3, the stream has the cl"),
        ([(image(), LABEL - 1)], ValueError, "has the id -1, the stream has the classes 0 to 2, and 255 marks"),
    ],
)
def test_a_labelled_set_that_does_not_fit_the_stream_is_refused_when_it_is_mixed(checkpoint, labelled, error, message):
    stream = HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None)
    with pytest.raises(error, match=message):
        mix(stream, labelled)


def test_an_image_beyond_the_first_ones_is_refused_when_it_is_needed(checkpoint):
    many = labelled_set(3) * 50
    many[1] = (image(3, 8, 8), LABEL)  # of 150, every second or third is read at once
    mixed = mix(HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None, batch_size=8), many)
    with pytest.raises(ValueError, match=r"labelled\[1\] is \[3, 8, 8\]"):
        take(mixed, 100)


def test_transforms_that_end_in_different_sizes_are_refused_with_the_remedy(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None, batch_size=2)
    mixed = mix(stream, labelled_set(1), transforms=lambda image, label: (image[:, :8], label[:8]))
    with pytest.raises(ValueError, match=r"labelled image 0 has the shape \[3, 8, 16\] where a sample.*\[3, 16, 16\]"):
        next(iter(mixed))


@pytest.mark.parametrize(
    ("batch_size", "share", "message"),
    [
        (None, 0, "share=0 is no mixture of both"),
        (None, 1.0, "share=1.0 is no mixture of both"),
        (None, "half", "share='half' is no mixture"),
        (None, 1e-9, "share=1e-09 is too close to 0"),
        (8, 0.3, r"share=0.3 of batch_size=8 would be 2.4 labelled.*k/8 with k from 1 to 7, the nearest is 2/8 = 0.25"),
        (4, 0.99, r"the nearest is 3/4 = 0.75"),
        (1, 0.5, "batch_size=1 has no row for both"),
    ],
)
def test_a_share_that_is_none_is_refused_with_those_that_are_possible(checkpoint, batch_size, share, message):
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        mix(stream, labelled_set(2), share)


def test_decimal_shares_mean_what_they_say(checkpoint):
    for batch_size, share, labelled in ((10, 0.3, 3), (9, 1 / 3, 3), (10, 0.7, 7), (100, 0.29, 29)):
        batch = next(iter(mixture(checkpoint, share, batch_size=batch_size)))
        assert int((batch.indices < 0).sum()) == labelled


def test_what_is_no_stream_or_a_mixture_already_is_refused(checkpoint):
    with pytest.raises(TypeError, match="stream=TensorDataset has no samples by index; pass a HandsOffStream"):
        mix(TensorDataset(torch.zeros(2)), labelled_set(2))
    with pytest.raises(ValueError, match=r"Companions\(5 labelled images, share=1/2\) already.*ConcatDataset"):
        mix(mixture(checkpoint), labelled_set(2))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"labelled": labelled_set(6)[1:]}, "saved with labelled='5 images, sha256"),
        ({"labelled": labelled_set(6)}, "saved with labelled='5 images, sha256"),
        ({"share": Fraction(1, 4)}, "saved with share='1/2', this stream has share='1/4'"),
        ({"seed": 1}, "saved with seed=0"),
    ],
)
def test_a_state_of_another_mixture_is_refused_by_name(checkpoint, other, named):
    mixed = mixture(checkpoint, batch_size=4)
    take(mixed, 2)
    with pytest.raises(ValueError, match=named):
        mixture(checkpoint, batch_size=4, **other).load_state_dict(through_json(mixed.state_dict()))
    same = mixture(checkpoint, batch_size=4, labelled=Subset(labelled_set(9), range(5)))
    same.load_state_dict(mixed.state_dict())


def test_a_state_of_the_stream_alone_is_refused_and_one_of_a_mixture_by_the_stream(checkpoint):
    alone = HandsOffStream(checkpoint, device="cpu", filter=FILTERS["block"](), synthesize=synthesize, chunk_size=4)
    with pytest.raises(ValueError, match="saved with labelled=None, this stream has labelled='5 images"):
        mixture(checkpoint).load_state_dict(alone.state_dict())
    with pytest.raises(ValueError, match="this stream has labelled=None"):
        alone.load_state_dict(mixture(checkpoint).state_dict())
    with pytest.raises(ValueError, match="differ in labelled"):
        merge_states(
            [
                mixture(checkpoint, shard=Shard(0, 2)).state_dict(),
                mixture(checkpoint, shard=Shard(1, 2), count=4).state_dict(),
            ]
        )


def test_batches_do_not_resume_between_a_sample_and_its_labelled_images(checkpoint):
    mixed = mixture(checkpoint)
    take(mixed, 3)
    with pytest.raises(ValueError, match=r"saved between a sample and the labelled images.*mixture of samples"):
        mixture(checkpoint, batch_size=4).load_state_dict(mixed.state_dict())
    next(iter(mixed))
    whole = mixture(checkpoint)
    take(whole, 4)
    resumed = mixture(checkpoint, batch_size=4)
    resumed.load_state_dict(whole.state_dict())
    assert [index for index, _ in rows(take(resumed, 1))][0] >= 2


def test_ranks_do_not_share_what_one_of_them_would_hand_out_alone(checkpoint):
    mixed = mixture(checkpoint, epoch_size=20)
    take(mixed, 3)
    state = mixed.state_dict()
    with pytest.raises(ValueError, match=r"which one rank would hand out more than the others of 2"):
        mixture(checkpoint, epoch_size=20, shard=Shard(0, 2)).load_state_dict(merge_states([state]))
    resumed = mixture(checkpoint, epoch_size=20)
    resumed.load_state_dict(merge_states([state]))
    assert len(list(resumed)) == 40 - 3
