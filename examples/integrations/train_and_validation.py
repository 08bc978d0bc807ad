"""Training and validation from one stream: `skip` and `take` part the indices; the filter holds for both.

python examples/integrations/train_and_validation.py
"""

from torch.utils.data import DataLoader, Subset

from handsoff_stream import HandsOffStream, LabelledBatch


def split(stream: HandsOffStream[LabelledBatch], indices: int) -> tuple[DataLoader[LabelledBatch], ...]:
    """Loaders for training and for validation: all but the first `indices`, and those, the same at every pass."""
    return DataLoader(stream.skip(indices), batch_size=None), DataLoader(stream.take(indices), batch_size=None)


def unfiltered(stream: HandsOffStream[LabelledBatch], indices: int) -> DataLoader[tuple[object, object]]:
    """Map-style access asks for indices, so rejected samples are among them."""
    return DataLoader(Subset(stream, range(indices)), batch_size=4)  # type: ignore[arg-type]


if __name__ == "__main__":
    stream = HandsOffStream("faces", batch_size=4)
    train, validation = split(stream, 16)
    print(next(iter(train)).indices, [batch.indices.tolist() for batch in validation])
