"""A user's program passes mypy and pyright in their strict modes, and both find a user's mistakes.

`make lint` runs this file: the checkers and the stubs of torch belong to its environment, where every version is
pinned. `make test` does not collect this folder, so the tests do not depend on a type checker. Pyright is run as
basedpyright, whose package contains the whole program; in mode "strict" the two have the same rules.

The programs are checked in a folder of their own, so the checkers find the installed package, as a user's would, and
read its types only because of `py.typed`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAM, MISTAKES = "user_script.py", "mistakes.py"
Errors = dict[str, dict[int, str]]  # by name of the program: messages by line


def mypy(folder: Path) -> Errors:
    command = [sys.executable, "-m", "mypy", "--strict", "--output", "json", PROGRAM, MISTAKES]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert not output.stderr
    errors: Errors = {PROGRAM: {}, MISTAKES: {}}
    for found in map(json.loads, output.stdout.splitlines()):
        if found["severity"] == "error":
            errors[found["file"]][found["line"]] = found["message"]
    return errors


def pyright(folder: Path) -> Errors:
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "pythonVersion": "3.11"}')
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", PROGRAM, MISTAKES]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    report = json.loads(output.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    errors: Errors = {PROGRAM: {}, MISTAKES: {}}
    for found in report["generalDiagnostics"]:
        errors[Path(found["file"]).name][found["range"]["start"]["line"] + 1] = found["message"]
    return errors


@pytest.fixture(scope="module", params=[mypy, pyright])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    folder = tmp_path_factory.mktemp("user")
    for name in (PROGRAM, MISTAKES):
        shutil.copy(HERE / name, folder)
    return request.param(folder)


def test_a_users_program_passes_in_strict_mode(errors: Errors):
    assert errors[PROGRAM] == {}


def test_every_mistake_is_found_in_its_line(errors: Errors):
    lines = (HERE / MISTAKES).read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}
    assert wrong and errors[MISTAKES].keys() == wrong
