"""What every command line has: a version, `-h`, completion, one sentence for a missing device, and an end by Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint
from typer.testing import CliRunner

import handsoff_stream
from handsoff_stream.checkpoint import save_checkpoint
from handsoff_stream.cli import app

COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'handsoff-stream'; import handsoff_stream.cli as c; c.main()",
)
VERBS = sorted(one.name or one.callback.__name__.replace("_", "-") for one in app.registered_commands)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint(folder / "c.safetensors", make_checkpoint())
    return folder


def test_the_version_is_printed_and_nothing_else():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"handsoff-stream {handsoff_stream.__version__}\n", "")


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_h_is_help_everywhere(verb):
    short, long = (CliRunner().invoke(app, [*([verb] if verb else []), flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and short.output == long.output and "Usage" in short.output


@pytest.mark.parametrize(
    ("words", "completed"),
    [("handsoff-stream ex", ["export"]), ("handsoff-stream export --shard", ["--shard-size"])],
)
def test_a_shell_completes_commands_and_options(words, completed):
    asked = {"_HANDSOFF_STREAM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env={**os.environ, **asked})
    assert (done.returncode, done.stdout.split()) == (0, completed), done.stderr


def test_the_help_says_how_a_shell_learns_to_complete():
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["gpu", "cuda"])
@pytest.mark.parametrize("line", ["preview {c} {out}", "export {c} {out}", "train {c} {out}", "demo --out {out}"])
def test_a_device_that_is_not_there_is_one_sentence_before_the_work(place, tmp_path, device, line):
    arguments = line.format(c=place / "c.safetensors", out=tmp_path / "out").split(" ")
    result = CliRunner().invoke(app, [*arguments, "--device", device])
    assert result.exit_code == 2 and result.output.startswith("handsoff-stream: ") and result.output.count("\n") == 1
    assert f"device '{device}'" in result.output and "pass" in result.output
    assert not (tmp_path / "out").exists()


def interrupt(arguments: list[str], when: Path) -> subprocess.CompletedProcess[str]:
    """A real process that is sent SIGINT as soon as a file exists, whether or not our own parent ignores SIGINT."""
    command = [COMMAND[0], COMMAND[1], f"import signal; signal.signal(2, signal.default_int_handler); {COMMAND[2]}"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not when.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


KEPT = "interrupted; what is finished is kept; repeat the command to go on"


def test_an_interrupted_export_says_how_to_go_on_and_going_on_ends_with_the_same_files(place, tmp_path):
    def arguments(folder, num):
        options = ["--num", str(num), "--shard-size", "20", "--device", "cpu"]
        return ["export", str(place / "c.safetensors"), str(tmp_path / folder), *options]

    done = interrupt(arguments("one", 4000), tmp_path / "one" / "shard-000001.tar")
    assert done.returncode == 130 and done.stderr == f"handsoff-stream: {KEPT}\n"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")}
    assert 2 <= len(kept) < 200 and not list((tmp_path / "one").glob("*.partial*"))
    assert CliRunner().invoke(app, arguments("two", 20 * len(kept))).exit_code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.tar")} == kept


def test_an_interrupted_training_says_that_it_begins_again(place, tmp_path):
    out = tmp_path / "new folder" / "out.pt"
    arguments = ["train", str(place / "c.safetensors"), str(out), "--steps", "100000", "--device", "cpu"]
    done = interrupt(arguments, out.parent)
    assert done.returncode == 130 and not out.exists()
    last = done.stderr.splitlines()[-1]
    assert last == "handsoff-stream: interrupted; an unfinished training is not kept; repeat the command to begin again"
