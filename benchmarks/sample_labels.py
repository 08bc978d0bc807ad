"""What a teacher, ignored pixels, image scores and soft labels do to the labels of a stream's samples.

    OMP_NUM_THREADS=1 python -m benchmarks.sample_labels runs/labels --parts options --judge-steps 0
    OMP_NUM_THREADS=1 python -m benchmarks.sample_labels runs/labels --parts options --name sample_labels-judged
    OMP_NUM_THREADS=1 python -m benchmarks.sample_labels runs/labels --parts teacher --name sample_labels-teacher

A segmentation network with unlimited annotation, the judge, labels the same samples; how well the labels agree with the
judge's is what is reported. It errs too, so differences count for more than the numbers themselves; its own IoU on
validation renders is in the result. Without a judge, which takes a quarter of an hour to train on a CPU core, a sample
shows the classes that its own label has, and only what is kept is reported.

    options   the labels of a checkpoint's samples (by default `faces`): accuracy and share of the pixels that are kept
              when the most uncertain ones are ignored, relative to their class or with one bound for all classes that
              removes as many; samples with each class that a filter keeps for each image score; the Brier score of
              hard and of soft labels
    teacher   two checkpoints of the same generator, fitted on 16 labelled faces with and without `fit --teacher`:
              IoU of each class with the judge

The folder keeps the judge, the inversions and the checkpoints; the same command goes on where it was stopped.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import write_result
from benchmarks.downstream.batches import labels_of, load_teacher
from benchmarks.downstream.teacher import experiment_of_teacher, train_teacher
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, PALETTE, labelled_faces
from handsoff_stream.downstream import SegmentationMeter
from handsoff_stream.fitting import (
    FitSettings,
    InversionSettings,
    Perceptual,
    SampleSettings,
    Teacher,
    TeacherSettings,
    calibrate,
    fit_checkpoint,
    invert,
)
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation
from handsoff_stream.uncertainty import above_class_mean, class_relative_score, class_totals, image_score

FACTOR = 1.25
"""Of the mean uncertainty of a class; FreeMask's."""
KEPT = 0.9
"""Share of the samples that a filter keeps."""
SHOWN = 30
"""Pixels of a class, as the judge labels them, from which on a sample shows it."""
CHUNK = 4


class PixelsAtFourScales(Perceptual):
    """Squared differences of pixels at four scales: a distance without a network, for a short inversion on a CPU."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "pixels at four scales")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """float32 [B, N]."""
        scales = [F.avg_pool2d(images_BCHW, 2**k) for k in range(4)]
        return torch.cat([s.flatten(1) / s[0].numel() ** 0.5 for s in scales], dim=1)


class Labels:
    """The labels of a checkpoint's samples and what a judge says of the same images.

    Args:
        checkpoint: calibrated, of rendered faces.
        judge: images => logits; None: the labels are compared with themselves, so only what is kept is of interest.
        count: samples, from index 0 of seed 0 on.
    """

    def __init__(self, checkpoint: Checkpoint, judge: nn.Module | None, count: int):
        options = SynthesisOptions(truncation=checkpoint.truncation, labels="soft")
        synthesizer = Synthesizer(checkpoint, options, torch.device("cpu"))
        ids, uncertainty, soft, judged = [], [], [], []
        for start in range(0, count, CHUNK):
            images, features = synthesizer.generate(range(start, min(start + CHUNK, count)))
            (found,) = synthesizer.labeller(features).values()
            assert found.probabilities is not None
            ids.append(found.label)
            uncertainty.append(found.uncertainty)
            soft.append(found.probabilities.float())
            judged.append(found.label if judge is None else labels_of(judge, images))
        self.ids, self.uncertainty, self.soft, self.judged = (
            torch.cat(part) for part in (ids, uncertainty, soft, judged)
        )
        self.with_judge = judge is not None
        assert checkpoint.calibration is not None
        (means,) = checkpoint.calibration.class_uncertainty.values()
        self.means_K = torch.tensor([math.nan if mean is None else mean for mean in means])

    def agreement(self, kept_BHW: Tensor | None = None) -> dict[str, Any]:
        """IoU of each class, mean IoU and accuracy of the kept pixels, all by default; the share kept of each class.

        Classes of `accuracy_per_class` and `kept_per_class` are those of the labels, of `recall_per_class` the judge's.
        """
        kept_BHW = torch.ones_like(self.ids, dtype=torch.bool) if kept_BHW is None else kept_BHW
        of_class = {name: self.ids == k for k, name in enumerate(CLASS_NAMES)}
        kept = {
            "kept": _share(kept_BHW, torch.ones_like(kept_BHW)),
            "kept_per_class": {name: _share(kept_BHW, mine) for name, mine in of_class.items()},
        }
        if not self.with_judge:
            return kept
        meter = SegmentationMeter(CLASS_NAMES)
        meter.update(self.ids, self.judged.masked_fill(~kept_BHW, IGNORE_INDEX))
        right_BHW = self.ids == self.judged
        judged = {name: self.judged == k for k, name in enumerate(CLASS_NAMES)}
        return meter.compute().record() | {
            **kept,
            "accuracy_per_class": {name: _share(right_BHW, mine & kept_BHW) for name, mine in of_class.items()},
            "recall_per_class": {name: _share(right_BHW, theirs & kept_BHW) for name, theirs in judged.items()},
        }

    def ignoring(self) -> dict[str, Any]:
        """Agreement with every pixel, without those above their class's bound, and without as many above one bound."""
        ignored_BHW = above_class_mean(self.uncertainty, self.ids, self.means_K, FACTOR)
        everywhere = self.uncertainty.flatten().sort(descending=True).values[int(ignored_BHW.sum())]
        return {
            "all pixels": self.agreement(),
            "class-relative": self.agreement(~ignored_BHW),
            "one bound": self.agreement(self.uncertainty <= everywhere),
        }

    def filtering(self) -> dict[str, dict[str, Any]]:
        """For each image score: of the samples that show a class, the share that a cut of 10 % keeps, and agreement.

        The cut is the 90th percentile of these samples' scores.
        """
        totals = class_totals(self.uncertainty, self.ids, len(CLASS_NAMES))
        scores = {
            "top10_mean": image_score(self.uncertainty, "top10_mean"),
            "sum": image_score(self.uncertainty, "sum"),
            "class-relative": class_relative_score(*totals, self.means_K),
        }
        pixels_BK = torch.stack([(self.judged == k).sum(dim=(1, 2)) for k in range(len(CLASS_NAMES))], dim=1)
        shows_BK = pixels_BK >= SHOWN
        found = {}
        for kind, score_B in scores.items():
            kept_B = score_B <= score_B.quantile(KEPT)
            survive = {name: _share(kept_B, shows_BK[:, k]) for k, name in enumerate(CLASS_NAMES)}
            whole_BHW = kept_B[:, None, None].expand_as(self.ids)
            found[kind] = {"survive": survive}
            if self.with_judge:
                agreement = self.agreement(whole_BHW)
                found[kind] |= {"miou": agreement["miou"], "accuracy": agreement["pixel_accuracy"]}
        shown = {name: int(shows_BK[:, k].sum()) for k, name in enumerate(CLASS_NAMES)}
        return {"samples_that_show": shown, **found}

    def brier(self) -> dict[str, float]:
        """Brier score of hard and of soft labels as predictions of the judge's class, in [0, 2]; 0 is perfect."""
        truth_BKHW = F.one_hot(self.judged, len(CLASS_NAMES)).movedim(-1, 1).float()
        hard_BKHW = F.one_hot(self.ids, len(CLASS_NAMES)).movedim(-1, 1).float()
        labels = {"hard": hard_BKHW, "soft": self.soft}
        return {name: float((p - truth_BKHW).square().sum(dim=1).mean()) for name, p in labels.items()}


def _share(which: Tensor, of: Tensor) -> float | None:
    """Share of the elements of `of` that are in `which`; None if `of` is empty."""
    return float((which & of).sum() / of.sum()) if of.any() else None


def judge(folder: Path, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The judge and its scores on validation renders; trained unless the folder has it."""
    experiment = experiment_of_teacher(
        "faces", folder / "judge.pt", labelled=16, validation_images=args.validation_images
    )
    scores = folder / "judge.json"
    if not scores.exists():
        scores.write_text(json.dumps(train_teacher(experiment, args.judge_steps).record()))
    return load_teacher(experiment), json.loads(scores.read_text())


def calibrated(path: Path, checkpoint: Checkpoint, samples: int) -> Checkpoint:
    """The checkpoint with a calibration of this version, kept in a file."""
    if not path.exists():
        save_checkpoint(path, calibrate(checkpoint, num_samples=samples, progress=True))
    return load_checkpoint(path)


def fitted(folder: Path, args: argparse.Namespace, *, with_teacher: bool) -> Checkpoint:
    """The generator of `--checkpoint` with a label generator fitted on the labelled faces, calibrated."""
    path = folder / ("with-teacher.safetensors" if with_teacher else "without-teacher.safetensors")
    if path.exists():
        return load_checkpoint(path)
    generator = load_checkpoint(args.checkpoint).generator
    faces = labelled_faces(args.labelled)
    images, masks = zip(*(faces[i] for i in range(len(faces))), strict=True)
    latents = invert(
        generator,
        [(f"train-{i:02d}", image) for i, image in enumerate(images)],
        folder / "latents",
        InversionSettings(steps=args.inversion_steps, learning_rate=0.05, pixel_weight=0),
        perceptual=PixelsAtFourScales(),
        progress=True,
    )
    samples = None
    if with_teacher:
        teacher = Teacher(
            samples=SampleSettings(samples=args.taught_samples, confidence=args.confidence),
            training=TeacherSettings(members=args.teacher_members, steps=args.teacher_steps),
        )
        samples = teacher.label(generator, images, torch.stack(masks), CLASS_NAMES, truncation=0.7, progress=True)
    task, settings = Segmentation(CLASS_NAMES, PALETTE), FitSettings(epochs=args.epochs)
    one = fit_checkpoint(generator, latents, torch.stack(masks), task, settings, samples=samples, progress=True)
    return calibrated(path, one, args.calibration_samples)


def rows(result: Result) -> list[Row]:
    """The labels with a teacher against those without, and kept pixels and samples against all."""
    found = []
    if "teacher" in result:
        with_, without = result["teacher"]["with"], result["teacher"]["without"]
        what = f"labels of samples, mIoU with a judge's: {result['settings']['taught_samples']} samples of a teacher"
        found.append(Row(what, f"{with_['miou']:.1%}", f"without: {without['miou']:.1%}", None))
    if "ignore" in result:
        relative, one = result["ignore"]["class-relative"], result["ignore"]["one bound"]
        what = f"ignored pixels, {1 - relative['kept']:.0%} of all"
        if "miou" in relative:
            what += ": mIoU of the others"
            found.append(
                Row(f"{what}, bound relative to the class", f"{relative['miou']:.1%}", f"one: {one['miou']:.1%}", None)
            )
        for name in ("hair", "ears", "glasses", "hat"):
            shares = [kind["kept_per_class"][name] for kind in (relative, one)]
            if None not in shares:
                what_of = f"{what}: share of {name} that is kept, bound relative to the class"
                found.append(Row(what_of, f"{shares[0]:.0%}", f"one bound for all: {shares[1]:.0%}", None))
        scores = result["scores"]
        for name in ("glasses", "hat"):
            shares = [scores[kind]["survive"][name] for kind in ("class-relative", "top10_mean")]
            if None not in shares:
                number = scores["samples_that_show"][name]
                what = f"samples with {name}, of {number}, after a cut of 10 %, score relative to the classes"
                found.append(Row(what, f"{shares[0]:.0%}", f"top10_mean: {shares[1]:.0%}", None))
    return found


PRESENTATION = Presentation(rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="keeps what was computed")
    options.add_argument("--parts", nargs="+", choices=("options", "teacher"), default=["options", "teacher"])
    options.add_argument("--checkpoint", default="faces", help="name or path, of plain rendered faces in ten classes")
    options.add_argument("--judge-steps", type=int, default=600, help="0: no judge, for the part `options`")
    options.add_argument("--validation-images", type=int, default=100)
    options.add_argument("--samples", type=int, default=100, help="samples that are compared")
    options.add_argument("--calibration-samples", type=int, default=200)
    options.add_argument("--labelled", type=int, default=16)
    options.add_argument("--inversion-steps", type=int, default=200)
    options.add_argument("--teacher-members", type=int, default=TeacherSettings().members)
    options.add_argument("--teacher-steps", type=int, default=TeacherSettings().steps)
    options.add_argument("--taught-samples", type=int, default=SampleSettings().samples)
    options.add_argument("--confidence", type=float, default=SampleSettings().confidence)
    options.add_argument("--epochs", type=int, default=FitSettings().epochs)
    options.add_argument("--name", default="sample_labels", help="name of the result file")
    args = options.parse_args()
    if not args.judge_steps and "teacher" in args.parts:
        options.error("--judge-steps 0 leaves nobody to judge a teacher; pass steps, or --parts options")
    return args


def main() -> None:
    """Measure, print, and write the result."""
    args = arguments()
    console = Console(stderr=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    network: nn.Module | None = None
    settings = {key: value for key, value in vars(args).items() if key not in ("folder", "checkpoint")}
    settings["checkpoint"] = Path(args.checkpoint).name
    result: dict[str, Any] = {"settings": settings}
    if args.judge_steps:
        network, result["judge_on_validation_renders"] = judge(args.folder, args)
    if "options" in args.parts:
        path = args.folder / "calibrated.safetensors"
        labels = Labels(
            calibrated(path, load_checkpoint(args.checkpoint), args.calibration_samples), network, args.samples
        )
        result |= {"ignore": labels.ignoring(), "scores": labels.filtering()}
        if network is not None:
            result["brier"] = labels.brier()
    if "teacher" in args.parts:
        arms = {"without": False, "with": True}
        result["teacher"] = {}
        for name, with_teacher in arms.items():
            checkpoint = fitted(args.folder, args, with_teacher=with_teacher)
            found = Labels(checkpoint, network, args.samples).agreement()
            result["teacher"][name] = found | {"provenance": checkpoint.provenance}
            console.print(f"{name} teacher: mIoU {found['miou']:.3f}")
    write_result(args.name, result)


if __name__ == "__main__":
    main()
