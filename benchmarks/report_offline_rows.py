"""What is said of results about everything before the stream, and after it: `report_rows` for the other benchmarks."""

from collections.abc import Sequence
from typing import Any

from bar_chart import Chart
from report_rows import Kind, Result, Row


def fitting_rows(result: Result) -> list[Row]:
    ours, theirs = result["ours"]["peak_mb"], result["published"]["peak_mb"]
    what = f"fitting a label generator to {result['settings']['images']} images"
    accuracy = f"{result['accuracy']:.1%} of held-out pixels right"
    return [
        Row(
            f"{what}: time to {accuracy}",
            f"{result['ours_s']:.3g} s",
            f"published training: {result['published_s']:.3g} s",
            result["time_ratio"],
            True,
        ),
        Row(
            f"{what}: peak memory of the process",
            f"{ours:,.0f} MB",
            f"published training: {theirs:,.0f} MB",
            result["memory_ratio"],
        ),
    ]


def fitting_charts(result: Result) -> list[Chart]:
    sides = (("published", result["published"]), ("ours", result["ours"]))
    looks = [
        (f"{name}, {look['seconds']:.0f} s", 100 * look["accuracy"]) for name, side in sides for look in side["curve"]
    ]
    return [Chart("accuracy on held-out images, %, after", looks)]


def fitting_memory_rows(result: Result) -> list[Row]:
    measured, widths = result["measured"], tuple(result["settings"]["hidden"])
    return [
        Row(
            f"fitting at the published size, {measured['images']} images, {measured['channels']} channels, "
            f"{result['settings']['members']} members of {widths}: peak memory",
            f"{measured['fit_peak_mb'] / 1e3:,.3g} GB of the process",
            "what DatasetGAN's authors name for 16 images: 160 GB",
            None,
            True,
        )
    ]


def inversion_rows(result: Result) -> list[Row]:
    first, *others = result["ways"].items()
    images = result["arguments"]["images"]
    return [
        Row(
            f"inversion of {images} held-out renders: {name}",
            f"{way['psnr_db']:.3g} dB, {way['seconds_per_image']:.3g} s an image",
            f"{first[0]}: {first[1]['psnr_db']:.3g} dB",
            None,
        )
        for name, way in others
    ]


def inversion_charts(result: Result) -> list[Chart]:
    return [Chart("PSNR of inversions, dB", [(name, way["psnr_db"]) for name, way in result["ways"].items()])]


def _quality(found: dict[str, Any]) -> str:
    return f"{found['distance']:.3g}, {found['precision']:.1%}, {found['recall']:.1%}"


def generator_rows(result: Result) -> list[Row]:
    sets, floor = result["sets"], "other renders"
    return [
        Row(
            f"{name}: kernel distance to renders, precision, recall; {result['arguments']['images']} images",
            _quality(found),
            f"{floor}: {_quality(sets[floor])}",
            None,
        )
        for name, found in sets.items()
        if name != floor
    ]


def generator_charts(result: Result) -> list[Chart]:
    return [Chart("kernel distance to renders", [(name, found["distance"]) for name, found in result["sets"].items()])]


ARMS = {
    "transfer": "the labelled images, backbone frozen",
    "labelled": "the labelled images",
    "stream": "the stream",
    "mixed": "half stream, half labelled images",
    "stream-then-labelled": "the stream, then the labelled images",
    "datasetgan": "a stream from labelled samples",
    "judged": "the stream's images, labelled by a network trained on renders",
    "unlimited": "unlimited labelled images",
    # Of results from before November 25, 2026:
    "plain": "the stream without augmentation",
    "rendered": "unlimited labelled images",
}


def downstream_rows(result: Result) -> list[Row]:
    settings, arms = result["settings"], result["summary"]
    what = f"mIoU of DeepLabV3-{settings['backbone']}, {settings['steps']} steps, {len(settings['seeds'])} seed(s)"
    first, *others = sorted(arms, key=lambda name: name != "stream")
    return [
        Row(f"{what}: {ARMS[first]}", _miou(arms[first]), f"{ARMS[name]}: {_miou(arms[name])}", None, first == "stream")
        for name in others
    ]


def _miou(arm: dict[str, Any]) -> str:
    spread = arm["miou_std"]
    return f"{arm['miou_mean']:.1%}" + ("" if spread is None else f" ± {spread:.1%}")


def label_agreement_rows(result: Result) -> list[Row]:
    judge = f"the network's own on renders: {result['judge_on_renders']['miou']:.1%}"
    return [
        Row(f"labels of {r['checkpoint']} at psi {r['psi']}, mIoU with a network's", f"{r['miou']:.1%}", judge, None)
        for r in result["agreement"]
    ]


def downstream_charts(result: Result) -> list[Chart]:
    return [Chart("mIoU, %", [(name, 100 * arm["miou_mean"]) for name, arm in result["summary"].items()])]


def no_charts(_: Result) -> Sequence[Chart]:
    return ()


OFFLINE = {
    "fitting": Kind(fitting_rows, fitting_charts),
    "fitting_memory": Kind(fitting_memory_rows, no_charts),
    "inversion": Kind(inversion_rows, inversion_charts),
    "generator": Kind(generator_rows, generator_charts),
    "downstream": Kind(downstream_rows, downstream_charts),
    "label_agreement": Kind(label_agreement_rows, no_charts),
}
