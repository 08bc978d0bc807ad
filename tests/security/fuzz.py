"""Reads many damaged and crafted files; each must load or be refused quickly, with little memory, executing nothing.

    python tests/security/fuzz.py --files 100000 --seconds 900 --seed 1

prints one JSON object: counts per outcome, the slowest file, the largest memory. Exit code 1 names the file that broke
a rule, and leaves it beside the scratch folder. The rules:

- every error is this package's, and its message is one printable line of at most 300 characters (problems of labelled
  images have one line each);
- processor time and peak memory are at most ten times those of the valid file that the variant was made from, scaled
  by its size if the variant is larger; `LEAST_SECONDS` and `LEAST_MIB` are always allowed;
- no process, socket, unpickled name, code from a string, or file opened for writing; an audit hook watches for them.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import handsoff_stream
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.config import load_class_map
from handsoff_stream.datasets.labelled_images import LabelledImages, list_labelled
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap
from handsoff_stream.datasets.labelled_images.pictures import read_image
from handsoff_stream.files.containers import read_content
from handsoff_stream.files.scan import scan_file
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.inversion.latents import read_latent
from handsoff_stream.fitting.published import read_experiment, read_latents
from handsoff_stream.generators import load_generator
from handsoff_stream.inspect import describe

DATA = Path(__file__).parents[1] / "data"
PACKAGE = str(Path(handsoff_stream.__file__).parent)
MIB = 2**20
FACTOR, LEAST_SECONDS, LEAST_MIB = 10, 0.3, 48
ADDRESS_SPACE = 3 * 2**30  # more than the process has when it begins: what allocates more fails

LATENT_NAMES = ("image_0", "image_2")

Change = Callable[[bytes, random.Random], bytes]
Read = Callable[[Path], Any]


@dataclass
class Kind:
    """Honest files of one format, how they are varied, and who reads them."""

    name: str
    seeds: list[bytes]
    suffix: str
    read: Read
    changes: tuple[Change, ...] = (mutations.mutated,)
    weight: float = 1.0
    """How often it is chosen; files that take long to read are chosen less often."""
    seconds: float = 0.0
    mib: float = 0.0
    """Of the valid files, the largest."""


class RuleBrokenError(Exception):
    """What the file did that no file may make a reader do."""


def read_files(*names: str) -> list[bytes]:
    return [(DATA / name).read_bytes() for name in names]


def kinds(folder: Path) -> list[Kind]:
    """All formats that are read."""
    zipped = (mutations.mutated, mutations.in_zip, mutations.in_zip)
    raw = (mutations.mutated, mutations.pickle_spliced, mutations.soup)
    header = (mutations.mutated, mutations.in_safetensors, mutations.in_safetensors, mutations.in_safetensors)
    own, latent = _own_files(folder)
    return [
        Kind("NVlabs pickle", read_files("stylegan2ada_16_resnet.pkl", "evil/evil_persistence.pkl"), ".pkl",
             load_generator, raw),
        Kind("rosinality, zip", read_files("rosinality_32.pt"), ".pt", load_generator, zipped, weight=0.5),
        Kind("rosinality, legacy", read_files("rosinality_train_8.pt"), ".pt", load_generator, raw[:2], weight=0.5),
        Kind("DatasetGAN", read_files("stylegan1_128.pt"), ".pt", load_generator, zipped, weight=0.5),
        Kind("hostile pickles", read_files("evil/evil.pkl", "evil/evil_storage.pkl", "evil/evil_dotted.pkl"), ".pkl",
             read_content, raw),
        Kind("ReStyle encoder", read_files("restyle_e4e_cars_tiny.pt"), ".pt", load_restyle, zipped[1:], weight=0.2),
        Kind("member of a label generator", read_files("label_generator/model_0.pth"), ".pth", read_content, zipped),
        Kind("checkpoint", [own], ".safetensors", load_checkpoint, header),
        Kind("checkpoint, inspected", [own], ".safetensors", describe, header),
        Kind("latent", [latent], ".safetensors", read_latent, header),
        Kind("latents, objects", read_files("label_generator/restyle_latents.npy"), ".npy",
             lambda path: read_latents(path, LATENT_NAMES), raw[:2]),
        Kind("latents, numbers", read_files("label_generator/latents_formatted.npy"), ".npy",
             lambda path: read_latents(path, ["0", "1"])),
        Kind("experiment", read_files("label_generator/exp.json"), ".json", read_experiment,
             (mutations.mutated, mutations.in_json)),
        Kind("class map", [p.read_bytes() for p in sorted(Path(PACKAGE, "assets/class_maps").glob("*.yaml"))[:3]],
             ".yaml", load_class_map),
        *_picture_kinds(folder),
    ]  # fmt: skip


def _own_files(folder: Path) -> tuple[bytes, bytes]:
    sys.path.insert(0, str(DATA.parent))
    from conftest import make_checkpoint

    from handsoff_stream.checkpoint import save_checkpoint

    save_checkpoint(folder / "own.safetensors", make_checkpoint(num_calibration=20))
    save_file({"w_plus": torch.randn(6, 8)}, folder / "latent.safetensors", {"handsoff_stream_sample": '{"seed": 1}'})
    return (folder / "own.safetensors").read_bytes(), (folder / "latent.safetensors").read_bytes()


def _picture_kinds(folder: Path) -> list[Kind]:
    """Images and masks, read as parts of a set, where every problem becomes a line."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    Image.fromarray(noise).save(folder / "image.png")
    Image.fromarray((noise[..., 0] > 128).astype(np.uint8)).save(folder / "mask.png")
    class_map = ClassMap.of_ids(("dark", "bright"))

    def labelled(image: Path, mask: Path) -> None:
        for file, place in ((image, "images"), (mask, "masks")):
            for old in (folder / place).iterdir():
                old.unlink()
            (folder / place / f"x{file.suffix}").symlink_to(file)
        LabelledImages(list_labelled(folder / "images", folder / "masks"), class_map)

    def picture(kind: str, pixels: np.ndarray, **options: Any) -> bytes:
        Image.fromarray(pixels).save(folder / "made", kind, **options)
        return (folder / "made").read_bytes()

    np.save(folder / "mask.npy", (noise[..., 0] > 128).astype(np.uint8))
    ids = (noise[..., 0] > 128).astype(np.uint8)
    as_image, as_mask = lambda p: labelled(p, folder / "mask.png"), lambda p: labelled(folder / "image.png", p)  # noqa: E731
    png = (mutations.mutated, mutations.in_png)
    return [
        Kind("image, PNG", [picture("png", noise)], ".png", as_image, png),
        Kind("image, JPEG", [picture("jpeg", noise)], ".jpg", as_image),
        Kind("image, WebP", [picture("webp", noise, lossless=True), picture("webp", noise)], ".webp", as_image),
        Kind("image, BMP", [picture("bmp", noise)], ".bmp", as_image),
        Kind("image, TIFF", [picture("tiff", noise), picture("tiff", noise, compression="tiff_lzw")], ".tif", as_image),
        Kind("mask, PNG", [picture("png", ids)], ".png", as_mask, png),
        Kind("mask, npy", [(folder / "mask.npy").read_bytes()], ".npy", as_mask),
    ]


# The watch -------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "pickle.find_class", "ctypes.dlopen", "os.remove", "os.rename", "shutil.rmtree",
}  # fmt: skip
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: dies at once, since an exception might be caught by who caused it."""
    if not watching:
        return
    bad = event in FORBIDDEN
    if event == "exec" and not str(getattr(arguments[0], "co_filename", "")).startswith((sys.prefix, sys.base_prefix)):
        bad = PACKAGE not in str(getattr(arguments[0], "co_filename", ""))
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        bad = True
    if bad:
        print(f"executed: {event} {arguments!r:.300}", file=sys.stderr)
        os._exit(9)


def peak_mib() -> float:
    """Largest resident memory since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def attempt(kind: Kind, path: Path) -> tuple[str, float, float]:
    """(outcome, seconds, MiB) of reading one file.

    Raises:
        RuleBrokenError: an exception that is no sentence of this package.
    """
    global watching
    before, started = reset_peak(), time.process_time()
    outcome, error = "loaded", None
    watching = kind.suffix not in (".png", ".jpg", ".webp", ".bmp", ".tif") and not kind.name.startswith("mask")
    try:
        kind.read(path)
        scan_file(path)
    except Exception as raised:  # noqa: BLE001
        outcome, error = type(raised).__name__, raised
    watching = False
    seconds, mib = time.process_time() - started, peak_mib() - before
    if error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        lines = str(error).splitlines() if hasattr(error, "problems") else [str(error)]
        ours = trace is not None and trace.tb_frame.f_code.co_filename.startswith(PACKAGE)
        if not ours or not isinstance(error, ValueError):
            raise RuleBrokenError(f"{type(error).__name__}: {str(error)[:300]!a}") from error
        if not all(line.isprintable() and len(line) <= 302 for line in lines):
            raise RuleBrokenError(f"a message that is not printable: {str(error)[:400]!a}")
    return outcome, seconds, mib


def measure_honest(all_kinds: list[Kind], folder: Path) -> None:
    """Time and memory of the valid files, once everything that is imported late has been imported."""
    for kind in all_kinds:
        for data in kind.seeds:
            path = folder / f"honest{kind.suffix}"
            path.write_bytes(data)
            attempt(kind, path)
            costs = [attempt(kind, path) for _ in range(3)]
            kind.seconds = max(kind.seconds, min(cost[1] for cost in costs))
            kind.mib = max(kind.mib, max(cost[2] for cost in costs))


def run(count: int, seconds: float, seed: int) -> dict[str, Any]:
    """The whole run; see the module."""
    rng = random.Random(seed)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    all_kinds = kinds(scratch)
    warnings.simplefilter("ignore")
    measure_honest(all_kinds, scratch)
    sys.addaudithook(watch)
    outcomes: dict[str, collections.Counter[str]] = {kind.name: collections.Counter() for kind in all_kinds}
    slowest, largest = (0.0, "", 0), (0.0, "", 0)
    weights = [kind.weight for kind in all_kinds]
    started, done = time.monotonic(), 0
    while done < count and time.monotonic() - started < seconds:
        (kind,) = rng.choices(all_kinds, weights)
        data = rng.choice(kind.seeds)
        variant = rng.choice(kind.changes)(data, rng)
        path = scratch / f"variant{kind.suffix}"
        path.write_bytes(variant)
        try:
            outcome, took, mib = attempt(kind, path)
            longer = max(1.0, len(variant) / max(len(seed_) for seed_ in kind.seeds))
            if took > max(LEAST_SECONDS, FACTOR * kind.seconds * longer):
                raise RuleBrokenError(f"{took:.2f} s, the valid file {kind.seconds:.3f} s")
            if mib > max(LEAST_MIB, FACTOR * kind.mib * longer):
                raise RuleBrokenError(f"{mib:.0f} MiB, the valid file {kind.mib:.1f} MiB")
        except RuleBrokenError as error:
            kept = shutil.copy(path, Path(tempfile.gettempdir()) / f"fuzz-broke-a-rule-{seed}-{done}{kind.suffix}")
            raise SystemExit(f"{kind.name}, file {done} ({len(variant)} bytes, {kept}): {error}") from error
        outcomes[kind.name][outcome] += 1
        slowest = max(slowest, (took, kind.name, len(variant)))
        largest = max(largest, (mib, kind.name, len(variant)))
        done += 1
    shutil.rmtree(scratch)
    total = sum(outcomes.values(), collections.Counter())
    return {
        "files": done,
        "loaded": total["loaded"],
        "refused": done - total["loaded"],
        "kinds": {name: dict(counts) for name, counts in outcomes.items()},
        "slowest": dict(zip(("seconds", "kind", "bytes"), slowest, strict=True)),
        "largest": dict(zip(("mib", "kind", "bytes"), largest, strict=True)),
        "honest": {k.name: {"seconds": round(k.seconds, 4), "mib": round(k.mib, 1)} for k in all_kinds},
        "wall_seconds": round(time.monotonic() - started, 1),
    }


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Stop after so long, wall clock.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    read_image  # noqa: B018  (imported early: nothing may be imported while the hook watches)
    limit_memory()
    print(json.dumps(run(given.files, given.seconds, given.seed)))
