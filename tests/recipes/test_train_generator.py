"""The generator trainer resumes exactly, grows without changing images, and has the paper's discriminator."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from handsoff_stream.checkpoint import Checkpoint, save_checkpoint
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.generators import load_generator
from handsoff_stream.generators.layers import filter_fir, fir_kernel
from handsoff_stream.generators.stylegan2 import StyleGAN2
from recipes.faces.discriminator import Discriminator, Encoder, grow, minibatch_standard_deviation
from recipes.faces.gan_losses import average, feature_distance, pyramid_distance
from recipes.faces.gan_networks import Settings
from recipes.faces.gan_trainer import Trainer
from recipes.faces.generator_images import ImageArray, ImageFolder, RandomOrder, open_data

ROOT = Path(__file__).parents[2]
MODULE = "recipes.faces.train_generator"


def settings(**changes) -> Settings:
    defaults = {
        "data": None,
        "stages": ((8, 32), (16, 64)),
        "batch": 4,
        "channels": (8, 7, 6),
        "z_dim": 8,
        "mapping_layers": 2,
        "lr": 0.002,
        "r1": 1.0,
        "r1_every": 4,
        "mixing": 0.5,
        "ema_images": 100.0,
        "seed": 0,
    }
    return Settings(**{**defaults, **changes})


def trainer(**changes) -> Trainer:
    return Trainer(settings(**changes), torch.device("cpu"), torch.float32)


def reals(step: int, resolution: int = 8) -> torch.Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (4, 3, resolution, resolution), generator=rng, dtype=torch.uint8)


def weights(t: Trainer) -> list[torch.Tensor]:
    return [v.clone() for network in t.networks.values() for v in network.state_dict().values()]


@pytest.mark.parametrize("autoencode", [0.0, 10.0])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_continues_bit_by_bit(stop, autoencode):
    whole = trainer(autoencode=autoencode)
    for step in range(6):
        whole.step(reals(step))
    first = trainer(autoencode=autoencode)
    for step in range(stop):
        first.step(reals(step))
    second = trainer(autoencode=autoencode)
    second.load_state_dict(first.state_dict())
    for step in range(stop, 6):
        second.step(reals(step))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert (second.num_images, second.num_steps) == (24, 6)


def test_a_grown_generator_makes_the_same_image_at_twice_the_size():
    t = trainer()
    for step in range(3):
        t.step(reals(step))
    small = t.networks["ema"]
    t.enter_stage(16)
    large = t.networks["ema"]
    w = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    before = small.synthesis(small.truncate(w)).images
    after = large.synthesis(large.truncate(w)).images
    assert after.shape == (2, 3, 16, 16)
    # The filter that doubles the skip image keeps constants, away from the border; averaging undoes most of it.
    inside = (F.avg_pool2d(after, 2) - before)[:, :, 1:-1, 1:-1]
    assert inside.abs().mean() < 0.35 * before.std()
    t.step(reals(9, resolution=16))


def test_a_grown_discriminator_judges_the_halved_image_as_before():
    torch.manual_seed(0)
    old, new = Discriminator(channels=(8, 7)), Discriminator(channels=(8, 7, 9))
    for parameter in old.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    grow(old, new)
    images = torch.randn(4, 3, 16, 16)
    halved = filter_fir(images, fir_kernel(), pad=(1, 1), stride=2)
    assert torch.allclose(new(images), old(halved), atol=1e-5)
    new(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new.blocks[1].down.parameters())
    assert new.blocks[1].skip.weight.grad.abs().max() > 0


def test_training_learns_something():
    """A generator of flat images against flat bright reals: its mean brightness has to rise."""
    t = trainer(stages=((8, 10_000),), mixing=0.0, lr=0.01)
    bright = torch.full((4, 3, 8, 8), 230, dtype=torch.uint8)
    w = t.networks["generator"].mapping(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    before = t.networks["generator"].synthesis(t.networks["generator"].truncate(w)).images.mean().item()
    for _ in range(60):
        metrics = t.step(bright)
    w = t.networks["generator"].mapping(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    after = t.networks["generator"].synthesis(t.networks["generator"].truncate(w)).images.mean().item()
    assert after > before + 0.3
    assert all(v.isfinite() for v in metrics.values())


def test_autoencoding_brings_real_images_out_of_their_own_codes():
    """Two flat images, one dark and one bright: their reconstructions have to move apart, and towards them."""
    t = trainer(stages=((8, 10_000),), mixing=0.0, lr=0.01, autoencode=10.0, kl=0.0)
    images = torch.tensor([30, 220, 30, 220], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
    first = t.step(images)
    for _ in range(80):
        last = t.step(images)
    assert last["pixels"] < 0.4 * first["pixels"]
    with torch.no_grad():
        mean, _ = t.networks["encoder"](images[:2].float() / 127.5 - 1)
        dark, bright = t._generate(2, torch.Generator().manual_seed(0), mean).mean(dim=(1, 2, 3))
    assert bright > dark + 0.5


def test_the_discriminator_rests_while_the_autoencoder_learns_alone():
    t = trainer(autoencode=10.0, autoencode_first=8)
    before = [p.clone() for p in t.networks["discriminator"].parameters()]
    assert t.step(reals(0)).keys() == {"pixels", "features", "kl"}
    t.step(reals(1))
    assert all(torch.isfinite(w).all() for w in weights(t))
    assert all(torch.equal(a, b) for a, b in zip(before, t.networks["discriminator"].parameters(), strict=True))
    assert {"pixels", "kl", "loss_d", "loss_g"} <= t.step(reals(2)).keys()


def test_a_run_that_began_without_an_encoder_can_go_on_with_one_and_grow():
    before = trainer()
    before.step(reals(0))
    after = trainer(autoencode=10.0)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.networks["ema"].constant, before.networks["ema"].constant)
    after.step(reals(1))
    mean_small, _ = after.networks["encoder"](filter_fir(torch.ones(1, 3, 16, 16), fir_kernel(), pad=(1, 1), stride=2))
    after.enter_stage(16)
    mean_large, _ = after.networks["encoder"](torch.ones(1, 3, 16, 16))
    assert torch.allclose(mean_small, mean_large, atol=1e-4)
    assert {"pixels", "features", "kl"} <= after.step(reals(2, resolution=16)).keys()


def test_the_kl_divergence_of_the_encoder_is_the_textbooks():
    t = trainer(autoencode=10.0)
    images = torch.randn(4, 3, 8, 8)
    mean, log_variance = t.networks["encoder"](images)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    textbook = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1).mean()
    _, kl = t._encode(images, torch.Generator().manual_seed(0))
    assert torch.allclose(kl, textbook, rtol=1e-4)


def test_distances_of_reconstructions_have_known_values():
    black, white = torch.full((1, 3, 8, 8), -1.0), torch.ones(1, 3, 8, 8)
    assert pyramid_distance(black, black) == 0 and pyramid_distance(black, white) == 4
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    # Fine detail counts at full resolution only: |1| there, 0 after halving.
    assert pyramid_distance(checkers.expand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)) == 1 / 3
    # ((1 - 0)^2 / 1^2 + (2 - 1)^2 / 2^2) / 2
    assert feature_distance([torch.zeros(1, 2), torch.ones(2)], [torch.ones(1, 2), torch.full((2,), 2.0)]) == 0.625


def test_only_the_discriminator_learns_first_when_asked(tmp_path):
    t = trainer(discriminator_first=8)
    before = [p.clone() for p in t.networks["generator"].parameters()]
    t.step(reals(0))
    t.step(reals(1))
    assert all(torch.equal(a, b) for a, b in zip(before, t.networks["generator"].parameters(), strict=True))
    t.step(reals(2))
    assert not all(torch.equal(a, b) for a, b in zip(before, t.networks["generator"].parameters(), strict=True))


def test_the_ema_of_a_fine_tuned_generator_begins_with_what_it_knew(tmp_path):
    first = trainer(stages=((8, 100),), channels=(8, 7))
    save_checkpoint(tmp_path / "trained.safetensors", Checkpoint(first.networks["generator"]))
    t = trainer(stages=((8, 100),), channels=(8, 7), start_from=str(tmp_path / "trained.safetensors"), ema_images=4.0)
    start = t.networks["ema"].constant.clone()
    assert torch.equal(start, first.networks["generator"].constant)
    t.step(reals(0))
    now = t.networks["generator"].constant
    assert not torch.equal(start, now) and torch.allclose(t.networks["ema"].constant, (start + now) / 2, atol=1e-6)


def test_the_ema_generator_follows_with_its_half_life():
    t = trainer(ema_images=4.0)
    t.num_images = 1000  # past the ramp-up
    start = t.networks["ema"].constant.clone()
    t.step(reals(0))
    now = t.networks["generator"].constant
    assert torch.allclose(t.networks["ema"].constant, (start + now) / 2, atol=1e-6)


def test_the_encoder_gives_mean_and_log_variance_of_each_code():
    mean, log_variance = Encoder(channels=(8, 6), z_dim=5)(torch.randn(3, 3, 8, 8))
    assert mean.shape == log_variance.shape == (3, 5)


@pytest.mark.parametrize(("channels", "size"), [((8,), 4), ((8, 6), 8), ((8, 6, 4), 16)])
def test_the_discriminator_gives_one_logit_an_image(channels, size):
    assert Discriminator(channels=channels)(torch.randn(4, 3, size, size)).shape == (4,)


def test_minibatch_standard_deviation_is_zero_for_equal_images_and_known_for_two():
    same = torch.ones(4, 2, 3, 3)
    assert minibatch_standard_deviation(same)[:, 2].abs().max() < 2e-4
    pair = torch.stack([torch.zeros(2, 3, 3), torch.full((2, 3, 3), 2.0)])
    assert torch.allclose(minibatch_standard_deviation(pair)[:, 2], torch.ones(2, 3, 3), atol=1e-4)


def test_the_random_order_is_the_same_from_any_position_on():
    def order(start, count):
        iterator = iter(RandomOrder(1000, 7, start))
        return [next(iterator) for _ in range(count)]

    whole = order(0, 9000)
    assert order(4090, 100) == whole[4090:4190]
    assert len(set(whole)) > 990


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("start", [0, 4088])
def test_processes_share_the_random_order(start, world):
    orders = [iter(RandomOrder(1000, 7, start, rank=rank, world=world)) for rank in range(world)]
    alone = iter(RandomOrder(1000, 7, start))
    for _ in range(40):
        assert [next(order) for order in orders] == [next(alone) for _ in range(world)]


def test_folders_and_arrays_of_images_are_read(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "deeper").mkdir()
    Image.new("L", (16, 16), 7).save(tmp_path / "deeper" / "b.jpg")
    folder = ImageFolder(tmp_path, 8)
    assert len(folder) == 2 and folder[0].shape == (3, 8, 8) and folder[0].dtype == torch.uint8
    np.save(tmp_path / "array.npy", np.full((5, 3, 8, 8), 9, np.uint8))
    assert torch.equal(ImageArray(tmp_path / "array.npy")[4], torch.full((3, 8, 8), 9, dtype=torch.uint8))
    np.save(tmp_path / "wrong.npy", np.zeros((5, 8, 8)))
    with pytest.raises(ValueError, match="save uint8"):
        ImageArray(tmp_path / "wrong.npy")
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(tmp_path / "deeper" / "nothing", 8)


def step_in_a_group(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    t = trainer(autoencode=10.0)
    for step in range(5):
        t.step(reals(10 * step + rank))
    numbers = [torch.ones(3) * rank, torch.arange(2.0) + 10 * rank]
    average(numbers)
    assert t.num_images == 2 * 5 * 4
    torch.save({"weights": weights(t), "averaged": numbers}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_on_different_images_hold_the_same_weights(tmp_path):
    torch.multiprocessing.spawn(step_in_a_group, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    for numbers in (first["averaged"], second["averaged"]):
        assert numbers[0].tolist() == [0.5] * 3 and numbers[1].tolist() == [5, 6]
    alone = trainer(autoencode=10.0)
    for step in range(5):
        alone.step(reals(10 * step))
    assert not all(torch.equal(a, b) for a, b in zip(first["weights"], weights(alone), strict=True))


@pytest.mark.slow
def test_torchrun_trains_what_one_process_resumes_and_sigterm_stops_after_a_step(tmp_path):
    options = ["--resolution", "16", "--batch", "4", "--channels", "8", "7", "6", "--z-dim", "8", "--workers", "0"]
    options += ["--mapping-layers", "2", "--sheet-every", "8", "--device", "cpu"]
    script = ["-m", MODULE, str(tmp_path / "run"), *options]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    running = subprocess.Popen(
        [*launcher, "--images", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    (images, steps, _) = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["position"]
    assert images == 4 * steps > 64
    command = [sys.executable, *script, "--images", str(images + 4)]
    assert (
        f"resuming at {images} images"
        in subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    )


def test_the_script_trains_resumes_and_writes_a_generator_that_loads(tmp_path):
    def run(images):
        command = [sys.executable, "-m", MODULE, str(tmp_path / "run"), "--resolution", "16"]
        command += ["--images", str(images), "--batch", "4", "--channels", "8", "7", "6", "--z-dim", "8"]
        command += ["--mapping-layers", "2", "--workers", "0", "--sheet-every", "8", "--device", "cpu"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    run(16)
    assert "resuming at 16 images" in run(24)
    generator = load_generator(tmp_path / "run" / "generator.safetensors")
    assert isinstance(generator, StyleGAN2) and generator.resolution == (16, 16)
    with Image.open(tmp_path / "run" / "samples_00000024.png") as sheet:
        assert sheet.size == (128, 128)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows and {"images", "loss_d", "loss_g"} <= rows[0].keys()


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("rare", [0.0, 1.0])
def test_rendered_faces_wear_glasses_and_hats_as_often_as_asked(rare, varied):
    images = open_data(None, 16, rare=rare, varied=varied)
    wanted = RenderedFaces("generator", num_images=5, size=16, glasses=rare, hat=rare, varied=varied)
    for i in range(5):
        assert torch.equal(images[i], wanted[i][0].mul(255).round().to(torch.uint8))
