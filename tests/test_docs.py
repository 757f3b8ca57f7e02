"""The documentation has every public name, and every example is a page of the gallery."""

import ast
import importlib
import types
from pathlib import Path

import pytest

import deformnet

ROOT = Path(__file__).parent.parent
PACKAGE = Path(deformnet.__file__).parent
PAGES = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
# What only other parts of the package use.
INTERNAL = {"deformnet.cli", "deformnet.ops.cpu", "deformnet.tasks.detection"}


def packages():
    for path in sorted(PACKAGE.rglob("__init__.py")):
        yield ".".join(("deformnet", *path.relative_to(PACKAGE).parent.parts))


def public_packages():
    for name in packages():
        documented = name != "deformnet" and name not in INTERNAL
        if documented and getattr(importlib.import_module(name), "__all__", ()):
            yield name


@pytest.mark.parametrize("name", list(public_packages()))
def test_packages_are_in_the_api(name):
    assert f".. automodule:: {name}\n" in PAGES


@pytest.mark.parametrize("name", list(public_packages()))
def test_public_names_have_docstrings(name):
    package = importlib.import_module(name)
    things = {public: getattr(package, public) for public in package.__all__}
    kinds = (type, types.FunctionType)
    assert not [name for name, it in things.items() if isinstance(it, kinds) and not it.__doc__]


def test_every_name_at_the_top_is_documented_below():
    below = {
        name for package in public_packages() for name in importlib.import_module(package).__all__
    }
    assert set(deformnet.__all__) - below == {"UserError", "__version__"}
    assert {"load", "using"} <= set(deformnet.__all__)


def test_sub_packages_load_lazily():
    for name in ("models", "data", "tasks", "engine", "analysis", "paper"):
        assert getattr(deformnet, name).__name__ == f"deformnet.{name}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_have_a_title_and_cells(path):
    text = path.read_text()
    title, rule, *_ = ast.get_docstring(ast.parse(text)).splitlines()
    assert rule == "=" * len(title)
    assert "\n# %%\n" in text
