"""A user's labelled files: images, masks, what the masks mean, and latents where they exist.

Knows how these become the generator's size and tensors to learn from. Does not know how latents are found, or how
labels are learned.

Shape letters: N images, H W image size, h w label size, L number of style inputs, D latent size.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.datasets.labelled_images import Geometry, LabelledImages, list_labelled
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap
from handsoff_stream.fitting.augment import AugmentationSettings, with_augmentations
from handsoff_stream.fitting.inversion.latents import LatentSpace, read_latent
from handsoff_stream.fitting.published import read_latents
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Rectangle, Size
from handsoff_stream.provenance import sha256


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """A user's labelled images, and how they are brought to the generator's size and to classes."""

    images: Path
    """Folder of images, or a CSV or JSON manifest."""
    labels: Path | None = None
    """Folder of masks; None with a manifest."""
    class_map: ClassMap
    resize: str = "exact"
    """How images of another size are brought to the generator's: "exact", "crop" or "pad"; see `Geometry`."""
    label_height: int | None = None
    """Height of the labels in pixels, whose shape is the generator's; None: the generator's."""
    crop_box: Rectangle | None = None
    """In pixels of every image; cut out first."""
    smallest_region: int = 0
    """Connected components of fewer pixels become unlabelled; see `LabelledImages`."""
    given_latents: Path | None = None
    """Published `.npy` of latents, see `read_latents`; None: those that the manifest names, if any."""
    latent_space: LatentSpace = LatentSpace()
    """Of the given latents, or of those of the manifest."""

    def open(self, resolution: Size) -> LabelledImages:
        """The set, read and checked, at the generator's (H, W).

        Raises:
            LabelledImagesError: all that is wrong with it.
            ValueError: a size or a crop box that cannot be used.
        """
        height, width = resolution
        label_size = None if self.label_height is None else (self.label_height, self.label_height * width // height)
        geometry = Geometry(resolution, label_size, self.resize, self.crop_box)
        listing = list_labelled(self.images, self.labels)
        return LabelledImages(listing, self.class_map, geometry, smallest_region=self.smallest_region)

    def latents(self, labelled: LabelledImages, generator: Generator) -> dict[str, Tensor]:
        """Name => w+, float32 [L, D], of the images that need no inversion.

        Raises:
            ValueError: a latent of another shape than its space has; a space other than w+, but no latents.
            CheckpointError: a file of latents that cannot be read.
        """
        if self.given_latents is not None:
            found = read_latents(self.given_latents, labelled.names)
        else:
            found = {entry.name: read_latent(entry.latent) for entry in labelled.entries if entry.latent is not None}
        if self.latent_space.name != "w+" and not found:
            raise ValueError(
                f"latents {self.latent_space.name}, but none are given; pass their file, or a manifest that names them"
            )
        return self.latent_space.w_plus(generator, found)

    def describe(self, labelled: LabelledImages, *, latents_given: bool) -> dict[str, Any]:
        """JSON-able, for a checkpoint's provenance: files with their SHA-256, class map, space of given latents."""
        files = [file for pair in labelled.files for file in pair]
        about: dict[str, Any] = {"sources": {f"{file.parent.name}/{file.name}": sha256(file) for file in files}}
        about["class_map"] = self.class_map.config()
        if latents_given:
            about["latent_space"] = asdict(self.latent_space)
        return about


def examples(
    labelled: LabelledImages, augmentation: AugmentationSettings | None, *, latents_given: bool
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Images and masks to learn from, those of the set first, then their augmentations.

    Returns:
        (name, float32 [3, H, W] in [0, 1]) of each, and the int64 masks [N, h, w].

    Raises:
        ValueError: augmentations of images whose latents are given, or of padded images.
    """
    images, masks = [(name, image) for name, image, _ in labelled], torch.stack([mask for _, _, mask in labelled])
    if augmentation is None:
        return images, masks
    if latents_given:
        raise ValueError(
            "augmented images are inverted, images with given latents are not; leave out the augmentations or the "
            "latents"
        )
    if labelled.covered is not None:
        raise ValueError(
            "an augmentation of a padded image would move the bars, which the generator never does; leave out the "
            "augmentations, or crop the images instead"
        )
    return with_augmentations(images, masks, labelled.class_map.num_classes, augmentation)
