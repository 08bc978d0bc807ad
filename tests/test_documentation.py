"""Documentation: public names have docstrings, references resolve, the tree is complete, the code runs."""

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

import handsoff_stream.outlets

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PACKAGES = ["handsoff_stream", "handsoff_stream.downstream", "handsoff_stream.fitting"]
OUTLETS = [
    f"handsoff_stream.outlets.{module.name}" for module in pkgutil.iter_modules(handsoff_stream.outlets.__path__)
]
FRAMEWORKS = {
    "handsoff_stream.outlets.lightning_callback": "lightning",
    "handsoff_stream.outlets.trainer": "transformers",
}
"""Modules that need a framework, which need not be installed."""


def public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """What `__all__` lists, or else the functions and classes that the module defines."""
    names = getattr(module, "__all__", None)
    if names is not None:
        yield from ((name, getattr(module, name)) for name in names)
        return
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name, value


def undocumented(name: str, value: object) -> Iterator[str]:
    """The public name itself and the public members of a class, as far as they lack a docstring."""
    if not inspect.isclass(value):
        if callable(value) and not inspect.getdoc(value):
            yield name
        return
    own = vars(value).get("__doc__")
    if not own or own.startswith(f"{value.__name__}("):  # what @dataclass writes where nobody has
        yield name
    for member, attribute in vars(value).items():
        described = inspect.isroutine(attribute) or isinstance(attribute, property | classmethod | staticmethod)
        if described and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
            yield f"{name}.{member}"


def referenced() -> list[str]:
    """What the pages of the API reference are built from."""
    return re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)


def docstring(path: str) -> str | None:
    """Of the module or the member of a module with this dotted name; a module is not imported for it."""
    module, _, name = path.rpartition(".")
    parent = importlib.util.find_spec(module) if module else None
    if parent is None or (parent.submodule_search_locations and importlib.util.find_spec(path)):
        return ast.get_docstring(source(path))
    return inspect.getdoc(getattr(importlib.import_module(module), name))


def source(module: str) -> ast.Module:
    """The syntax tree of a module, which may need a framework that is not installed."""
    return ast.parse(Path(importlib.util.find_spec(module).origin).read_text())


def undocumented_in_source(module: str) -> list[str]:
    """Public classes, functions and methods of a module without a docstring, found without importing it."""
    missing = []
    for node in source(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            members = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
            for member in members:
                public = isinstance(member, ast.ClassDef | ast.FunctionDef) and not member.name.startswith("_")
                overrides = isinstance(node, ast.ClassDef) and node.bases and member is not node
                if public and not overrides and not ast.get_docstring(member):
                    missing.append(member.name)
    return missing


@pytest.mark.parametrize("name", [*PACKAGES, *OUTLETS])
def test_every_public_name_has_a_docstring(name):
    if importlib.util.find_spec(FRAMEWORKS.get(name, "torch")) is None:
        assert ast.get_docstring(source(name)) and undocumented_in_source(name) == []
        return
    module = importlib.import_module(name)
    members = list(public_members(module))
    assert members and module.__doc__
    assert [missing for member, value in members for missing in undocumented(member, value)] == []


def test_what_lacks_a_docstring_is_noticed():
    class Described:
        """A class."""

        def bare(self) -> None: ...

        @property
        def bare_too(self) -> int: ...

    def bare() -> None: ...

    assert list(undocumented("Described", Described)) == ["Described.bare", "Described.bare_too"]
    assert list(undocumented("bare", bare)) == ["bare"]


def test_the_reference_covers_the_public_packages_and_names_what_exists():
    assert set(referenced()) >= {*PACKAGES, *OUTLETS}
    for path in referenced():
        assert docstring(path), path


def test_the_reference_of_the_stream_has_every_public_name():
    listed = re.findall(r"^ +- (\w+)$", (ROOT / "docs/api/stream.md").read_text(), re.MULTILINE)
    assert sorted(listed) == handsoff_stream.__all__


# References --------------------------------------------------------------------------------------------------------


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and MkDocs derive them from headings."""
    titles = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text() if page.name != "CHANGELOG.md" else ""  # which also names what is gone
    folders = "handsoff_stream|tests|docs|benchmarks|examples|recipes"
    for file, _, test in re.findall(rf"`((?:{folders})/[\w./-]*)(::(\w+))?`", text):
        assert (ROOT / file).exists(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


# The tree ----------------------------------------------------------------------------------------------------------


def tree() -> dict[str, str]:
    """Path => description, of the block in docs/architecture.md; folders end in "/"."""
    block = re.search(r"^```tree\n(.*?)^```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    parents: list[str] = []
    described: dict[str, str] = {}
    for line in block[1].splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        del parents[len(indent) // 2 :]
        path = "".join(parents) + name
        assert path not in described, f"{path} is there twice"
        described[path] = description
        if name.endswith("/"):
            parents.append(name)
    return described


def committed() -> list[str]:
    """Every file of the repository, as git knows them."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout, so there is no list of files to compare with")
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def test_the_tree_describes_every_file_and_nothing_else():
    described = tree()
    folders = {path for path in described if path.endswith("/")}
    whole = {path for path in folders if not any(other != path and other.startswith(path) for other in described)}
    files = committed()

    def is_described(file: str) -> bool:
        parents = {f"{parent}/" for parent in PurePosixPath(file).parents}
        package = file.endswith("/__init__.py") and file.removesuffix("__init__.py") in folders
        return file in described or package or bool(parents & whole)

    assert [file for file in files if not is_described(file)] == [], "add a line for each to docs/architecture.md"
    gone = [path for path in described if not any(file == path or file.startswith(path) for file in files)]
    assert gone == [], "these are in docs/architecture.md and nowhere else"
    assert [path for path, description in described.items() if not description] == []


# The README --------------------------------------------------------------------------------------------------------


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len(readme().splitlines()) <= 110


def test_the_readme_shows_five_measured_rows():
    measured = re.search(r"<!-- measured.*?-->(.*?)<!-- end of measured -->", readme(), re.DOTALL)[1]
    assert len(re.findall(r"^\|", measured, re.MULTILINE)) == 2 + 5


def test_what_the_readme_says_the_stream_teaches_is_what_was_measured():
    def percent(file: str, arm: str) -> str:
        summary = json.loads((ROOT / "benchmarks/results" / file).read_text())["summary"][arm]
        spread = summary["miou_std"]
        return f"{summary['miou_mean']:.1%}".replace("%", "" if spread is None else f" ± {100 * spread:.1f}") + " %"

    for figure in (
        percent("downstream.json", "stream"),
        percent("downstream.json", "labelled"),
        percent("downstream-ceiling.json", "rendered"),
    ):
        assert f"| {figure.replace('  ', ' ')} |" in readme()


def run(page: str, **replaced: str) -> dict[str, object]:
    """The names that the Python code of a page leaves, on a small checkpoint in place of `faces`."""
    namespace: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for old, new in replaced.items():
            code = code.replace(old, new)
        exec(code, namespace)
    return namespace


def test_the_code_of_the_readme_runs(checkpoint_path):
    smaller = {
        '"faces"': repr(str(checkpoint_path)),
        "labelled_faces(16)": "[(torch.zeros(3, 16, 16), torch.zeros(16, 16, dtype=torch.int64))]",
        "range(300)": "range(2)",
    }
    assert all(name in readme() for name in smaller)
    left = run("README.md", **smaller)
    assert left["step"] == 1 and left["loss"].isfinite()


def test_the_code_of_the_page_on_mixtures_runs():
    left = run("docs/mixtures.md")
    assert len(left["batch"]) == 8


def test_the_code_of_the_page_on_resuming_runs(checkpoint_path):
    left = run("docs/resume_and_shards.md", **{'"faces"': repr(str(checkpoint_path))})
    assert left["third"].indices.tolist() and len(left["shards"]) == 3


def test_the_commands_of_the_pages_exist_with_their_options():
    from typer.main import get_command

    from handsoff_stream.cli import app

    commands = get_command(app).commands
    for page in PAGES:
        shell = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
        for line in re.findall(r"^handsoff-stream (.*?)(?:\s+#.*)?$", shell, re.MULTILINE):
            verb, *words = line.split()
            assert verb in commands, line
            known = {option for parameter in commands[verb].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line
    known = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            assert set(re.findall(r"`(--[\w-]+)", page.read_text())) <= known, page
