"""Samples of a generator to draw labels on, with their latents: DatasetGAN's way to labelled images.

    FOLDER/images/0-000007.png            seed and index of the sample
    FOLDER/latents/0-000007.safetensors   w_plus, float32 [L, D]
    FOLDER/masks/                         empty: where masks are expected, by the name of the image
    FOLDER/samples.json                   which samples these are, so that they can be made again
    FOLDER/manifest.csv                   image,label,latent; written last: once it is there, everything is

Every file is written whole or not at all. The selection is stored before the first image, so that an interrupted run
continues with it, and ends with the same files, byte for byte.

Knows files and which sample is which. Does not know what makes a sample worth annotating (`active_selection`).

Shape letters: L number of style inputs, D latent size.
"""

import csv
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, import_generator, load_checkpoint
from handsoff_stream.device import check_device, default_chunk_size, resolve_device
from handsoff_stream.files.atomic import whole_file
from handsoff_stream.files.tensors import is_safetensors
from handsoff_stream.fitting.annotation.active_selection import select_actively
from handsoff_stream.generators import Generator
from handsoff_stream.isolation import isolated
from handsoff_stream.labeller import on_device
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.progress import progress_bar
from handsoff_stream.seeding import check_seed, latents
from handsoff_stream.synthesizer import Synthesizer, in_chunks, quantize

FORMAT_VERSION = 1
SAMPLE_KEY = "handsoff_stream_sample"
RECORD, MANIFEST = "samples.json", "manifest.csv"
IMAGES, LATENTS, MASKS = "images", "latents", "masks"


def write_samples(
    source: str | Path | Checkpoint,
    folder: str | Path,
    *,
    num: int = 12,
    candidates: int | None = None,
    seed: int = 0,
    truncation: float | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Path:
    """Write samples to annotate; continue if the folder holds an unfinished run of the same request.

    Args:
        source: checkpoint or published generator file, or a name that ships.
        folder: created if missing. A finished run of the same request is left as it is, masks and all.
        num: samples to write. DatasetGAN selects 12, of which an expert annotates the 6 most realistic.
        candidates: select actively among so many samples, see `active_selection`; needs a checkpoint with a head. None
            takes the first `num` samples, which are random.
        seed: which samples; another one than of images that are annotated already.
        truncation: psi; None means the checkpoint's own.
        device: where to synthesise; None means CUDA if there is one.
        progress: show bars.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a source that cannot be read.
        ValueError: nothing to write, a folder that holds anything else, candidates without a head or too few.
    """
    if num < 1:
        raise ValueError(f"num={num} samples leave nothing to annotate; pass at least 1")
    checkpoint = source if isinstance(source, Checkpoint) else open_source(source)
    chosen_device = resolve_device(device)
    check_device(chosen_device, in_worker=False)
    psi = checkpoint.truncation if truncation is None else truncation
    options = SynthesisOptions(seed=check_seed(seed), truncation=psi, score="sum")
    request = _request(checkpoint, options, num, candidates)
    folder = Path(folder)
    record = _stored(folder, request)
    if record is None:
        record = {**request, **_selection(checkpoint, options, num, candidates, chosen_device, progress)}
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RECORD, json.dumps(record, indent=1).encode())
    if not (folder / MANIFEST).exists():
        _write_all(on_device(checkpoint.generator, chosen_device), folder, record, progress)
    return folder / MANIFEST


def open_source(name_or_path: str | Path) -> Checkpoint:
    """A checkpoint, or a published generator file as a checkpoint without heads.

    Raises:
        CheckpointError: neither.
    """
    path = Path(name_or_path)
    if path.is_file() and not is_safetensors(path):
        return import_generator(path)
    return load_checkpoint(name_or_path)


def regenerate(generator: Generator, seed: int, index: int, truncation: float) -> tuple[Tensor, Tensor]:
    """One sample: w+ float32 [L, D], and the image float32 [3, H, W] in [0, 1] on 8-bit levels, at full resolution.

    Computed in its chunk of the stream, and so bit for bit what the stream labels.
    """
    ((chunk, (row,), _),) = in_chunks([index], default_chunk_size(generator.w_avg.device))
    w_plus_BLD, images_B3HW = _chunk(generator, seed, chunk, truncation)
    return w_plus_BLD[row].contiguous(), images_B3HW[row]


def _chunk(generator: Generator, seed: int, chunk: range, truncation: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), isolated():
        w_BD = generator.mapping(latents(seed, chunk, generator.z_dim).to(generator.w_avg.device))
        w_plus_BLD = generator.truncate(w_BD, truncation)
        return w_plus_BLD, quantize(generator.synthesis(w_plus_BLD, "const").images, generator.resolution)


def _request(checkpoint: Checkpoint, options: SynthesisOptions, num: int, candidates: int | None) -> dict[str, Any]:
    """What decides the samples, JSON-able."""
    return {
        "format_version": FORMAT_VERSION,
        "generator": Checkpoint(checkpoint.generator).manifest()["fingerprint"],
        "seed": options.seed,
        "truncation": options.truncation,
        "num": num,
        "candidates": candidates,
        "selected_by": None if candidates is None else checkpoint.manifest()["fingerprint"],
    }


def _stored(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier run of this request; None if nothing lies there."""
    if not folder.exists() or all(entry.name.startswith(".") for entry in folder.iterdir()):
        return None
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        differing = sorted(key for key, value in request.items() if record[key] != value)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not empty, and not of an earlier run ({error!r}); choose another folder") from None
    if differing:
        raise ValueError(
            f"{folder}: holds samples of another request, it differs in {', '.join(differing)}; nothing was written. "
            "Repeat that request to finish them, or choose another folder"
        )
    return record


def _selection(
    checkpoint: Checkpoint,
    options: SynthesisOptions,
    num: int,
    candidates: int | None,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    """What is found out about a request: indices, their scores if they were selected by them."""
    versions = {"handsoff_stream": version("handsoff_stream"), "torch": torch.__version__}
    if candidates is None:
        return {"indices": list(range(num)), "scores": None, "versions": versions}
    synthesizer = Synthesizer(checkpoint, options, device)
    indices, scores = select_actively(synthesizer, num, candidates=candidates, progress=progress)
    return {"indices": indices, "scores": scores, "versions": versions}


def _write_all(generator: Generator, folder: Path, record: dict[str, Any], progress: bool) -> None:
    """All samples of a record that are not there yet, then the manifest."""
    for name in (IMAGES, LATENTS, MASKS):
        (folder / name).mkdir(exist_ok=True)
    rows = io.StringIO()
    manifest = csv.writer(rows, lineterminator="\n")
    manifest.writerow(["image", "label", "latent"])
    with progress_bar("Sampling", len(record["indices"]), show=progress) as update:
        for done, index in enumerate(record["indices"], start=1):
            name = f"{record['seed']}-{index:06d}"
            image, latent = f"{IMAGES}/{name}.png", f"{LATENTS}/{name}.safetensors"
            if not ((folder / image).exists() and (folder / latent).exists()):
                _write_sample(generator, folder / image, folder / latent, record, index)
            manifest.writerow([image, f"{MASKS}/{name}.png", latent])
            update(done, "")
    _write(folder / MANIFEST, rows.getvalue().encode())


def _write_sample(generator: Generator, image: Path, latent: Path, record: dict[str, Any], index: int) -> None:
    w_plus_LD, image_3HW = regenerate(generator, record["seed"], index, record["truncation"])
    about = {
        "generator": record["generator"],
        "seed": record["seed"],
        "index": index,
        "truncation": record["truncation"],
    }
    # One entry: safetensors stores several in an order of its own, never the same twice.
    _write(latent, save({"w_plus": w_plus_LD.cpu()}, {SAMPLE_KEY: json.dumps(about)}))
    pixels = image_3HW.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    _write(image, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(content)
