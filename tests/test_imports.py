"""Who may import whom (the order that keeps the house in one piece)."""

import ast
import sys
from pathlib import Path

import pytest

import deformnet

ROOT = Path(deformnet.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each part of the package with the parts that it may import, from the bottom to the top.
MAY_IMPORT: dict[str, set[str]] = {}
for part, below in {
    "ops": (),
    "nn": ("ops",),
    "backbones": ("nn",),
    "models": ("backbones",),
    "recipes": ("models",),
    "runs": ("recipes",),
    "export": ("runs",),
    "parameters": ("recipes",),
    "timing": (),
    "data": (),
    "evaluation": (),
    "analysis": ("nn",),
    "datacheck": ("data", "runs"),
    "detections": ("data", "evaluation", "runs"),
    "inference": ("runs", "detections"),
    # Scoring a run is predicting as a user would, and comparing.
    "training": ("inference", "analysis"),
    "reproduce": ("training",),
    "bench": ("inference", "analysis", "timing"),
    "figures": ("runs", "inference", "analysis"),
    "report": ("inference", "figures"),
    "view": ("inference", "analysis"),
    "demo": ("training", "report"),
}.items():
    MAY_IMPORT[part] = set(below).union(*(MAY_IMPORT[name] for name in below))
# At the top: what users see, and the command line with the stories it tells.
MAY_IMPORT["deformnet"] = {"nn"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}

# The lower parts are for everyone's networks: they must not bring other packages along.
PACKAGES = {
    "ops": {"torch"},
    "nn": {"torch"},
    "backbones": {"torch", "torchvision", "safetensors"},
    "models": {"torch", "torchvision"},
    "data": {"torch", "torchvision", "numpy", "PIL", "tqdm"},
}
IMPLEMENTATIONS = {"cpu", "reference", "triton"}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    names = set()
    package = [ROOT.name, *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*stem, *([node.module] if node.module else [])])
            # `from a import b` may name a module b, or a thing in a: both count.
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return "deformnet" if first == "__init__.py" else first.removesuffix(".py")


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_parts_import_downwards_only(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} has no place in the order of imports: give it one"
    own = {name.split(".")[1] for name in imported(path) if name.startswith("deformnet.")}
    # Names like deformnet.__version__ belong to no part.
    assert (own & set(MAY_IMPORT)) - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_lower_parts_stand_on_few_packages(path):
    if part_of(path) not in PACKAGES:
        return
    packages = {name.split(".")[0] for name in imported(path)}
    foreign = packages - set(sys.stdlib_module_names) - {"deformnet"}
    allowed = PACKAGES[part_of(path)]
    if path.relative_to(ROOT).parts[:2] == ("ops", "triton"):
        allowed = allowed | {"triton"}
    assert foreign <= allowed


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_implementations_are_imported_by_the_library_alone(path):
    used = {
        name.split(".")[2]
        for name in imported(path)
        if name.startswith("deformnet.ops.") and name.split(".")[2] in IMPLEMENTATIONS
    }
    parts = path.relative_to(ROOT).parts
    if parts == ("ops", "library.py"):
        assert used == IMPLEMENTATIONS
    elif parts[0] == "ops" and parts[1] in IMPLEMENTATIONS:
        assert used <= {parts[1]}
    else:
        assert not used
