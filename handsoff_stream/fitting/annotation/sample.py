"""Samples of a generator to draw labels on, with their latents (DatasetGAN).

    FOLDER/images/0-000007.png            seed and index of the sample
    FOLDER/latents/0-000007.safetensors   w_plus, float32 [L, D]
    FOLDER/masks/                         empty: where masks are expected, by the name of the image
    FOLDER/samples.json                   which samples these are, so that they can be made again
    FOLDER/manifest.csv                   image,label,latent; written last: once it is there, everything is

Every file is written whole or not at all. The selection is stored before the first image, so that an interrupted run
continues with it and ends with the same files, byte for byte.

Knows files and which sample is which. Does not know what makes a sample worth annotating (`active_selection`).

Shape letters: L number of style inputs, D latent size.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, open_checkpoint
from handsoff_stream.device import default_chunk_size, usable_device
from handsoff_stream.files.atomic import check_folder, locked_folder, write_file
from handsoff_stream.files.schema import read_json
from handsoff_stream.fitting.annotation.active_selection import select_actively
from handsoff_stream.generators import Generator
from handsoff_stream.isolation import isolated
from handsoff_stream.labeller import on_device
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.progress import progress_bar
from handsoff_stream.provenance import versions
from handsoff_stream.seeding import check_seed, latents
from handsoff_stream.synthesizer import Synthesizer, in_chunks, quantize

FORMAT_VERSION = 1
SAMPLE_KEY = "handsoff_stream_sample"
RECORD, MANIFEST = "samples.json", "manifest.csv"
IMAGES, LATENTS, MASKS = "images", "latents", "masks"
MAX_SAMPLES, MAX_CANDIDATES = 100_000, 1_000_000


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
        folder: created if missing. The files of a finished run of the same request are left as they are, masks too.
        num: samples to write. DatasetGAN selects 12, of which an expert annotates the 6 most realistic.
        candidates: select actively among so many samples, see `active_selection`; needs a checkpoint with a head. None
            takes the first `num` samples, which are random.
        seed: decides the samples. Pass another seed than that of images that are annotated already.
        truncation: psi; None means the checkpoint's own.
        device: where to synthesize; None means CUDA if there is one.
        progress: show bars.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a source that cannot be read.
        OutputError: another process writes to the folder, or it cannot be written.
        ValueError: too few or too many samples, a folder that holds anything else, too few candidates, or candidates
            without a head to score them.
    """
    if num < 1:
        raise ValueError(f"num={num} samples leave nothing to annotate; pass at least 1")
    if num > MAX_SAMPLES or (candidates or 0) > MAX_CANDIDATES:
        raise ValueError(
            f"num={num}, candidates={candidates}: nobody annotates as many; pass up to {MAX_SAMPLES} samples of up to "
            f"{MAX_CANDIDATES} candidates"
        )
    chosen_device = usable_device(device)
    check_folder(folder)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    psi = checkpoint.truncation if truncation is None else truncation
    options = SynthesisOptions(seed=check_seed(seed), truncation=psi, score="sum")
    request = _request(checkpoint, options, num, candidates)
    with locked_folder(folder) as locked:
        record = _stored(locked, request)
        if record is None:
            record = {**request, **_selection(checkpoint, options, num, candidates, chosen_device, progress)}
            write_file(locked / RECORD, json.dumps(record, indent=1).encode())
        if not (locked / MANIFEST).exists():
            _write_all(on_device(checkpoint.generator, chosen_device), locked, record, progress)
        return locked / MANIFEST


def regenerate(generator: Generator, seed: int, index: int, truncation: float) -> tuple[Tensor, Tensor]:
    """One sample: w+ float32 [L, D], and the image float32 [3, H, W] in [0, 1] on 8-bit levels, at full resolution.

    Computed in its chunk of the stream, and so bit for bit what the stream labels.
    """
    ((chunk, (row,), _),) = in_chunks([index], default_chunk_size(generator.w_avg.device))
    w_plus_BLD, images_B3HW = generate_chunk(generator, seed, chunk, truncation)
    return w_plus_BLD[row].contiguous(), images_B3HW[row]


def generate_chunk(generator: Generator, seed: int, chunk: range, truncation: float) -> tuple[Tensor, Tensor]:
    """The samples of one chunk of a stream, on the generator's device: w+ and images, batched as in `regenerate`."""
    with torch.no_grad(), isolated():
        w_BD = generator.mapping(latents(seed, chunk, generator.z_dim).to(generator.w_avg.device))
        w_plus_BLD = generator.truncate(w_BD, truncation)
        return w_plus_BLD, quantize(generator.synthesis(w_plus_BLD, "const").images, generator.resolution)


def _request(checkpoint: Checkpoint, options: SynthesisOptions, num: int, candidates: int | None) -> dict[str, Any]:
    """Everything that decides the samples, JSON-able."""
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
        record: dict[str, Any] = read_json(folder / RECORD, "a record of samples")
        differing = sorted(key for key, value in request.items() if record[key] != value)
        if not differing and not all(type(index) is int and index >= 0 for index in record["indices"]):
            raise ValueError("its indices are no numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: not empty, and not the folder of an earlier run ({error!r}); choose another folder"
        ) from None
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
    """Indices of the samples of a request, and their scores if they were selected by these."""
    if candidates is None:
        return {"indices": list(range(num)), "scores": None, "versions": versions()}
    synthesizer = Synthesizer(checkpoint, options, device)
    indices, scores = select_actively(synthesizer, num, candidates=candidates, progress=progress)
    return {"indices": indices, "scores": scores, "versions": versions()}


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
    write_file(folder / MANIFEST, rows.getvalue().encode())


def _write_sample(generator: Generator, image: Path, latent: Path, record: dict[str, Any], index: int) -> None:
    w_plus_LD, image_3HW = regenerate(generator, record["seed"], index, record["truncation"])
    about = {
        "generator": record["generator"],
        "seed": record["seed"],
        "index": index,
        "truncation": record["truncation"],
    }
    # One metadata entry: safetensors writes several in an order that changes from run to run.
    write_file(latent, save({"w_plus": w_plus_LD.cpu()}, {SAMPLE_KEY: json.dumps(about)}))
    pixels = image_3HW.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    write_file(image, buffer.getvalue())
