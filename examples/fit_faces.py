"""Make the checkpoint named `faces`: a trained generator => 16 labelled renders inverted, fitted, calibrated.

    python examples/train_generator.py runs/faces
    python examples/fit_faces.py runs/faces/generator.safetensors handsoff_stream/assets/faces.safetensors

A script like this one is what you would write for labelled images that are not files; for folders there is
`handsoff-stream fit`. Weights are rounded to float16 before anything is computed with them, so that the file is small
and the calibration is that of the weights in it.
"""

import argparse
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from handsoff_stream import Checkpoint, load_checkpoint, load_generator, save_checkpoint
from handsoff_stream.datasets.labelled_faces import labelled_faces
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, PALETTE
from handsoff_stream.fitting import FitSettings, InversionSettings, fit_checkpoint, load_perceptual
from handsoff_stream.fitting.commands import save_calibrated
from handsoff_stream.tasks import Segmentation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--latents", type=Path, help="folder of the inversions; default: OUT.latents")
    parser.add_argument("--num-labelled", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500, help="of the inversion; 500 for faces in HandsOff")
    parser.add_argument("--hidden", type=int, nargs=2, default=(128, 32))
    parser.add_argument("--epochs", type=int, default=FitSettings().epochs)
    parser.add_argument("--calibration-samples", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    trained = load_checkpoint(args.generator)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "generator.safetensors"
        save_checkpoint(rounded, Checkpoint(trained.generator), half=True)
        generator = load_generator(rounded).to(args.device)

    faces = labelled_faces(args.num_labelled, size=generator.resolution[0])
    pairs = [faces[i] for i in range(len(faces))]
    checkpoint = fit_checkpoint(
        generator,
        [(f"train-{i:02d}", image) for i, (image, _) in enumerate(pairs)],
        torch.stack([mask for _, mask in pairs]),
        Segmentation(CLASS_NAMES, PALETTE),
        args.latents or args.out.with_suffix(".latents"),
        inversion=InversionSettings(steps=args.steps),
        fit=FitSettings(hidden=(args.hidden[0], args.hidden[1]), epochs=args.epochs),
        perceptual=load_perceptual().to(args.device),
        calibration_samples=0,
        sources={args.generator.name: hashlib.sha256(args.generator.read_bytes()).hexdigest()},
        progress=True,
    )
    provenance = {**checkpoint.provenance, "generator_training": trained.provenance}
    device = torch.device(args.device)
    save_calibrated(replace(checkpoint, provenance=provenance), args.out, device, args.calibration_samples, half=True)
    accuracy = checkpoint.provenance["fit"]["accuracy"]
    print(f"wrote {args.out}; accuracy on held-out pixels of the labelled images {accuracy:.1%}")


if __name__ == "__main__":
    main()
