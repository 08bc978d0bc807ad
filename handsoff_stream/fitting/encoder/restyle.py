"""Images => latents in W+ in one or a few passes of an encoder.

ReStyle (Alaluf et al., ICCV 2021, section 3): starting from the average latent, each pass shows the encoder the image
and what the generator makes of the current latent, and adds the step that it predicts.

Knows the iteration and what an encoder sees. Does not know files (`files`), how encoders are trained (`train`),
or how latents are refined (`inversion`).

Shape letters: B batch, H W image size, L number of style inputs, D latent size.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.fitting.encoder.backbones import StyleEncoder
from handsoff_stream.generators import Generator
from handsoff_stream.progress import progress_bar


class NamedImages(Protocol):
    """A list, or a dataset, of (name, image): float32 [3, H, W] in [0, 1]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[str, Tensor]: ...


def encode_images(
    encoder: StyleEncoder, generator: Generator, images: NamedImages, *, batch_size: int = 1, progress: bool = False
) -> dict[str, Tensor]:
    """Name => w+, float32 [L, D] on the CPU: the `encodings` of `invert_images`.

    Args:
        encoder: moved to the generator's device.
        generator: see `encode`.
        images: see `encode`; with names.
        batch_size: images encoded together. With more than one, the last bits depend on which images share a batch, so
            that `invert_images` inverts finished images again when the list has changed.
        progress: show a bar.

    Raises:
        ValueError: as `encode`.
    """
    encoder.to(generator.w_avg.device)
    found: dict[str, Tensor] = {}
    with progress_bar("Encoding", len(images), show=progress) as update:
        for start in range(0, len(images), batch_size):
            batch = [images[i] for i in range(start, min(start + batch_size, len(images)))]
            w_plus_BLD = encode(encoder, generator, torch.stack([image for _, image in batch])).cpu()
            found |= {name: w_plus_LD for (name, _), w_plus_LD in zip(batch, w_plus_BLD, strict=True)}
            update(start + len(batch), "")
    return found


@torch.no_grad()
def encode(
    encoder: StyleEncoder, generator: Generator, images_BCHW: Tensor, *, iterations: int | None = None
) -> Tensor:
    """Latents of a batch of images, after the last pass.

    Args:
        encoder: in eval mode, on the generator's device.
        generator: what the encoder was trained for.
        images_BCHW: float32 [B, 3, H, W] in [0, 1], of the generator's proportions at any scale; for an encoder
            that crops, whole or already cropped.
        iterations: passes; None means as many as the encoder was trained for, 5 for the published ones.

    Returns:
        float32 [B, L, D].

    Raises:
        ValueError: a generator or images that the encoder was not made for.
    """
    *_, (w_plus_BLD, _) = iterate(encoder, generator, images_BCHW, iterations=iterations)
    return w_plus_BLD


def iterate(
    encoder: StyleEncoder, generator: Generator, images_BCHW: Tensor, *, iterations: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each pass's latents [B, L, D] and what the generator makes of them, [B, 3, H, W], nominally in [-1, 1].

    Gradients reach a pass's own step only: the next pass starts from detached values. Arguments as for `encode`.
    """
    passes = encoder.config.iterations if iterations is None else iterations
    _check_generator(encoder, generator, passes)
    w_plus_BLD, shown_BCHW, target_BCHW = begin(encoder, generator, images_BCHW)
    for _ in range(passes):
        w_plus_BLD = next_latents(encoder, w_plus_BLD, shown_BCHW, target_BCHW)
        made_BCHW = generator.synthesis(w_plus_BLD, "const").images
        yield w_plus_BLD, made_BCHW
        w_plus_BLD, shown_BCHW = w_plus_BLD.detach(), resize_generated(encoder, made_BCHW.detach())


def begin(encoder: StyleEncoder, generator: Generator, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the first pass starts from; arguments as for `encode`.

    Returns:
        The average latent of each image [B, L, D]; what the generator makes of it, and the images, both as the encoder
        sees them, float32 [B, 3, *encoder.config.image_size], nominally in [-1, 1].
    """
    target_BCHW = to_working_size(encoder, generator, images_BCHW.to(generator.w_avg.device, torch.float32))
    with torch.no_grad():
        average_1CHW = generator.synthesis(encoder.latent_avg[None], "const").images
    w_plus_BLD = encoder.latent_avg.expand(len(images_BCHW), -1, -1)
    return w_plus_BLD, resize_generated(encoder, average_1CHW).expand_as(target_BCHW), target_BCHW


def next_latents(encoder: StyleEncoder, w_plus_BLD: Tensor, shown_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Latents after one more pass, [B, L, D]; arguments as `begin` returns them, of the current latents."""
    inputs_BCHW = torch.cat([target_BCHW, shown_BCHW], dim=1)[:, : encoder.config.input_channels]
    return w_plus_BLD + encoder(inputs_BCHW)


def crop_rows(images_BCHW: Tensor) -> Tensor:
    """The middle three quarters of the rows, [B, C, 3 H / 4, W], which square generators of cars fill."""
    height = images_BCHW.shape[2]
    return images_BCHW[:, :, height // 8 : height - height // 8]


def resize_generated(encoder: StyleEncoder, made_BCHW: Tensor) -> Tensor:
    """Generated images [B, 3, H, W] as the encoder sees them: cropped, then resized to its size by averaging areas."""
    cropped_BCHW = crop_rows(made_BCHW) if encoder.config.crop else made_BCHW
    return F.adaptive_avg_pool2d(cropped_BCHW, encoder.config.image_size)


def to_working_size(encoder: StyleEncoder, generator: Generator, images_BCHW: Tensor) -> Tensor:
    """Real images as the encoder sees them: cropped if whole, then resized bilinearly with antialiasing.

    Args:
        encoder: decides the size and the crop.
        generator: decides the proportions.
        images_BCHW: float32 [B, 3, H, W] in [0, 1].

    Returns:
        float32 [B, 3, *encoder.config.image_size] in [-1, 1].

    Raises:
        ValueError: images of another shape or range.
    """
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or images_BCHW.min() < 0 or images_BCHW.max() > 1:
        raise ValueError(f"images are {list(images_BCHW.shape)}; pass [B, 3, H, W] with values in [0, 1]")
    height, width = generator.resolution
    if encoder.config.crop and _proportional(images_BCHW, height, width):
        images_BCHW = crop_rows(images_BCHW)
    if encoder.config.crop:
        height -= 2 * (height // 8)
    if not _proportional(images_BCHW, height, width):
        raise ValueError(
            f"images are {list(images_BCHW.shape)}, this encoder and generator take the proportions of "
            f"{height} x {width}; crop or pad them first"
        )
    return F.interpolate(images_BCHW, encoder.config.image_size, mode="bilinear", antialias=True) * 2 - 1


def _proportional(images_BCHW: Tensor, height: int, width: int) -> bool:
    return images_BCHW.shape[2] * width == images_BCHW.shape[3] * height


def _check_generator(encoder: StyleEncoder, generator: Generator, passes: int) -> None:
    config = encoder.config
    if (config.num_ws, config.w_dim) != (generator.num_ws, generator.w_dim):
        raise ValueError(
            f"the encoder's latents are [{config.num_ws}, {config.w_dim}], the generator takes [{generator.num_ws}, "
            f"{generator.w_dim}]; use the generator that the encoder was trained for"
        )
    if passes < 1 or (passes > 1 and config.input_channels == 3):
        raise ValueError(
            f"iterations={passes}, but an encoder of {config.input_channels} input channels makes "
            f"{'1 pass' if config.input_channels == 3 else '1 or more passes'}; pass that"
        )
