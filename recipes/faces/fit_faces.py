"""Make the checkpoint named `faces`: a trained generator => 16 labelled renders inverted, fitted, calibrated.

    python -m recipes.faces.train_generator runs/faces --autoencode 30
    python -m recipes.faces.fit_faces runs/faces handsoff_stream/assets/faces.safetensors

Write a script like this one for labelled images that are not files; for folders use `handsoff-stream fit`. That command
uses LPIPS and a ReStyle encoder. This script uses the networks that were trained together with the generator instead:
the encoder predicts the latents that inversion starts from, and the discriminator's features measure how much two
images differ.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from handsoff_stream import load_checkpoint
from handsoff_stream.checkpoint import DEFAULT_TRUNCATION
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, PALETTE
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.fitting import (
    AugmentationSettings,
    FitSettings,
    InversionSettings,
    Perceptual,
    SampleSettings,
    Teacher,
    TeacherSettings,
    fit_checkpoint,
    invert,
    with_augmentations,
)
from handsoff_stream.fitting.from_files import save_calibrated
from handsoff_stream.generators import Generator
from handsoff_stream.provenance import sha256
from handsoff_stream.tasks import Segmentation
from recipes.faces.discriminator import Discriminator
from recipes.faces.gan_networks import Settings, build


class TrainedDistance(Perceptual):
    """The distance that the trainer's encoder was trained with: pixels at four scales, and discriminator features.

    VAE/GAN (Larsen et al., ICML 2016), section 2.3. LPIPS without trained weights responds to outlines and colors; a
    discriminator of the domain has learned eyes and noses.

    Args:
        discriminator: trained together with the generator.
        images: float32 [N, 3, H, W] in [-1, 1], real images, on which each level's energy is measured.
    """

    def __init__(self, discriminator: Discriminator, images: Tensor) -> None:
        with torch.no_grad():
            self.energies = [float(m.square().mean()) for m in discriminator.features(images)]
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in discriminator.parameters()))
        digest.update(repr(self.energies).encode())
        super().__init__(discriminator, f"pixels and discriminator features, {digest.hexdigest()[:16]}")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """float32 [B, N]; its squared differences sum to the trainer's loss, times ten."""
        maps = [(m, 1 / e) for m, e in zip(self.network.features(images_BCHW), self.energies, strict=True)]  # type: ignore[operator]
        scales = [torch.nn.functional.avg_pool2d(images_BCHW, 2**k) for k in range(4)]
        parts = [m.flatten(1) * (weight / len(maps) / m[0].numel()) ** 0.5 for m, weight in maps]
        parts += [s.flatten(1) * (10 / len(scales) / s[0].numel()) ** 0.5 for s in scales]
        return torch.cat(parts, dim=1)


def open_run(folder: Path) -> tuple[Generator, dict[str, torch.nn.Module], dict[str, object]]:
    """The generator of a run, the networks that were trained with it by name, and its provenance."""
    trained = load_checkpoint(folder / "generator.safetensors")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    networks = build(Settings(**json.loads(state["settings"])), state["position"][2])
    for name, network in networks.items():
        network.load_state_dict(state["networks"][name])
        network.eval().requires_grad_(False)
    return trained.generator, networks, trained.provenance


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of train_generator.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--latents", type=Path, help="folder of the inversions; default: OUT.latents")
    parser.add_argument("--num-labelled", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the inversion per image")
    parser.add_argument(
        "--augmentations", type=int, default=0, help="augmentations per image; more of those with glasses or hat"
    )
    parser.add_argument("--taught-samples", type=int, default=0, help="samples that a teacher labels; see `Teacher`")
    parser.add_argument("--teacher-steps", type=int, default=TeacherSettings().steps)
    parser.add_argument("--teacher-confidence", type=float, default=SampleSettings().confidence)
    parser.add_argument("--hidden", type=int, nargs=2, default=(128, 32))
    parser.add_argument("--epochs", type=int, default=FitSettings().epochs)
    parser.add_argument("--calibration-samples", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Invert, fit, calibrate, and write the checkpoint."""
    args = arguments()
    generator, networks, training = open_run(args.run)
    faces = labelled_faces(args.num_labelled, size=generator.resolution[0])
    pairs = [faces[i] for i in range(len(faces))]
    named = [(f"train-{i:02d}", image) for i, (image, _) in enumerate(pairs)]
    of_any_color = tuple(CLASS_NAMES.index(name) for name in ("glasses", "hat"))
    augmentation = AugmentationSettings(per_image=args.augmentations, flip=True, any_color=of_any_color)
    named, masks = with_augmentations(named, torch.stack([mask for _, mask in pairs]), len(CLASS_NAMES), augmentation)
    images = torch.stack([image for _, image in named]) * 2 - 1

    encodings: dict[str, Tensor] = {}
    if "encoder" in networks:
        w = generator.mapping(networks["encoder"](images)[0])
        encodings = dict(zip((name for name, _ in named), w[:, None].expand(-1, generator.num_ws, -1), strict=True))
    # The distance already compares pixels.
    inversion = InversionSettings(steps=args.steps, learning_rate=0.05, pixel_weight=0, radius=None)
    latents = invert(
        generator.to(args.device),
        named,
        args.latents or args.out.with_suffix(".latents"),
        inversion,
        perceptual=TrainedDistance(networks["discriminator"], images).to(args.device),  # type: ignore[arg-type]
        encode=(lambda pending: encodings) if encodings else None,
        progress=True,
    )
    about = {
        "sources": {"generator.safetensors": sha256(args.run / "generator.safetensors")},
        "generator_training": training,
    }
    if args.augmentations:
        about["augmentation"] = augmentation.config()
    samples = None
    if args.taught_samples:
        ensemble = TeacherSettings(steps=args.teacher_steps)
        which = SampleSettings(samples=args.taught_samples, confidence=args.teacher_confidence)
        teacher = Teacher(samples=which, training=ensemble)
        originals = [image for image, _ in pairs]
        samples = teacher.label(
            generator, originals, masks[: len(pairs)], CLASS_NAMES, truncation=DEFAULT_TRUNCATION, progress=True
        )
    settings = FitSettings(hidden=(args.hidden[0], args.hidden[1]), epochs=args.epochs)
    task = Segmentation(CLASS_NAMES, PALETTE)
    checkpoint = fit_checkpoint(generator, latents, masks, task, settings, about=about, samples=samples, progress=True)
    save_calibrated(checkpoint, args.out, torch.device(args.device), args.calibration_samples, half=True)
    provenance = checkpoint.provenance
    accuracy, psnr = provenance["fit"]["accuracy"], provenance["inversion"]["psnr"]
    print(f"wrote {args.out}; inversions {sum(psnr) / len(psnr):.1f} dB, accuracy on held-out pixels {accuracy:.1%}")


if __name__ == "__main__":
    main()
