"""Speed, acceptance, uncertainty and class shares in TensorBoard; W&B takes the same numbers by `wandb.log(values)`.

python examples/integrations/log_the_stream.py && tensorboard --logdir runs
"""

from torch.utils.tensorboard import SummaryWriter

from handsoff_stream import HandsOffStream, LabelledBatch
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.meter import StreamMeter


def train(stream: HandsOffStream[LabelledBatch], folder: str, steps: int, every: int) -> None:
    """Log every `every` steps."""
    loader = HandsOffLoader(stream)
    meter, writer = StreamMeter(loader), SummaryWriter(folder)
    for step, batch in zip(range(1, steps + 1), loader, strict=False):
        meter.update(batch)  # and train on it
        if step % every == 0:
            for name, value in meter.values().items():
                writer.add_scalar(name, value, step)
    writer.close()


if __name__ == "__main__":
    train(HandsOffStream("faces", batch_size=4), "runs", steps=6, every=2)
