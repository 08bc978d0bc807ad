"""Imports of the package point in one direction without cycles, and importing it is cheap."""

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import handsoff_stream

ROOT = Path(handsoff_stream.__file__).parent

# Each module may import any layer above its own, and of its own layer what WITHIN_LAYER lists.
LAYERS = [
    {"errors"},
    {"batch", "class_ids", "device", "files", "geometry", "isolation", "precision", "progress", "provenance"}
    | {"seeding", "shard", "uncertainty", "wrapping"},
    {"features", "manifest"},
    {"filters", "generators", "label_generator", "noise", "prefetch", "tasks", "transforms"},
    {"companions"},
    {"assembly", "options", "position"},
    {"checkpoint"},
    {"labeller", "source"},
    {"synthesizer"},
    {"graphs"},
    {"stream"},
    {"config", "downstream", "inspect", "mixture", "outlets", "preview"},
    {"fitting"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
WITHIN_LAYER: set[tuple[str, str]] = set()
OPTIONAL = {
    "lightning",
    "lpips",
    "ray",
    "segmentation_models_pytorch",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
    "triton",
    "webdataset",
    "yaml",
}


def part(path: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth in the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def internal(path: Path) -> set[str]:
    """Parts of the package that a file imports, other than its own."""
    parts = [name.split(".") for name in imports(path) if name.startswith("handsoff_stream.")]
    return {p[1] for p in parts if p[1] in LEVEL or p[1] == "datasets"} - {part(path)}


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name != "__init__.py" or p.parent != ROOT]


def test_every_file_belongs_to_a_known_layer():
    assert {part(p) for p in FILES} - LEVEL.keys() == {"datasets"}


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        mine = part(path)
        if mine == "datasets":
            continue
        for other in internal(path) - {"datasets"}:
            if LEVEL[other] >= LEVEL[mine] and (mine, other) not in WITHIN_LAYER:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_the_online_half_does_not_know_the_offline_half_or_real_images():
    online = {name for layer in LAYERS[: LEVEL["stream"] + 1] for name in layer}
    for path in FILES:
        if part(path) in online:
            assert not internal(path) & {"datasets", "downstream", "fitting", "outlets"}, path


def module_name(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = ("handsoff_stream", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: Collection[str]) -> set[str]:
    """The modules of the package that a file needs; `from package import module` needs the module alone."""
    needed: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            needed |= names if names <= set(modules) else {str(node.module), *names}
    return needed & set(modules)


def test_no_module_is_part_of_a_circle_not_even_through_an_import_inside_a_function():
    modules = {module_name(path): path for path in ROOT.rglob("*.py")}
    graph = {name: imported_modules(path, modules.keys()) - {name} for name, path in modules.items()}

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    assert [name for name in modules if name in reaches(name)] == []


def test_datasets_import_nothing_of_the_package_but_leaves():
    for path in FILES:
        if part(path) == "datasets":
            assert not internal(path) - {"class_ids", "errors", "geometry"}, path


def test_what_must_not_know_does_not_know():
    forbidden = {
        "generators": {"tasks", "label_generator", "synthesizer", "filters", "stream"},
        "tasks": {"generators", "features", "label_generator", "synthesizer"},
        "label_generator": {"tasks", "generators"},
        "stream": {"features", "generators", "label_generator", "tasks"},
        "files": {"generators", "label_generator", "tasks"},
        "filters": {"tasks", "generators", "features", "label_generator", "synthesizer"},
    }
    for path in FILES:
        assert not internal(path) & forbidden.get(part(path), set()), path
    assert not {n for n in imports(ROOT / "filters.py") if n.startswith("torch")}


def test_optional_packages_are_imported_in_their_own_rooms_only():
    allowed = {
        "lightning": {"outlets"},
        "lpips": {"fitting"},
        "segmentation_models_pytorch": {"downstream"},
        "torchmetrics": {"downstream"},
        "torchvision": {"downstream", "fitting", "transforms"},
        "transformers": {"outlets"},
        "triton": {"label_generator"},
        "webdataset": {"outlets"},
        "yaml": {"config"},
    }
    for path in FILES:
        for name in {n.split(".")[0] for n in imports(path)} & OPTIONAL:
            assert part(path) in allowed.get(name, set()), f"{path} imports {name}"


def test_only_prefetch_batch_and_graphs_name_cuda_streams():
    for path in FILES:
        if "torch.cuda.Stream" in path.read_text() or "torch.cuda.current_stream" in path.read_text():
            assert path.name in {"batch.py", "graphs.py", "prefetch.py"}, path


def test_importing_the_package_loads_no_optional_package():
    code = f"import sys, handsoff_stream; print(sorted({OPTIONAL} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_facade_lists_its_names_sorted():
    assert handsoff_stream.__all__ == sorted(handsoff_stream.__all__)
    for name in handsoff_stream.__all__:
        assert hasattr(handsoff_stream, name)
