"""The pages hold every public name, and every script of the gallery can be one."""

import ast
import importlib
import types
from pathlib import Path

import pytest

import deformnet

ROOT = Path(__file__).parent.parent
PAGES = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
# What a backend is made of is no one's to call.
PRIVATE = {"deformnet.ops.reference", "deformnet.ops.cpu", "deformnet.ops.triton"}


def public_packages():
    for path in sorted(Path(deformnet.__file__).parent.rglob("__init__.py")):
        parts = path.relative_to(Path(deformnet.__file__).parent).parent.parts
        name = ".".join(("deformnet", *parts))
        if parts and name not in PRIVATE and hasattr(importlib.import_module(name), "__all__"):
            yield name


@pytest.mark.parametrize("name", list(public_packages()))
def test_packages_are_in_the_api(name):
    assert f".. automodule:: {name}\n" in PAGES


@pytest.mark.parametrize("name", list(public_packages()))
def test_public_names_say_what_they_are(name):
    package = importlib.import_module(name)
    things = {public: getattr(package, public) for public in package.__all__}
    kinds = (type, types.FunctionType)
    assert not [name for name, it in things.items() if isinstance(it, kinds) and not it.__doc__]


def test_names_at_the_top_are_those_of_the_layers():
    assert set(deformnet.__all__) - {"__version__"} == set(deformnet.nn.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_scripts_have_a_title_and_cells(path):
    text = path.read_text()
    title, rule, *_ = ast.get_docstring(ast.parse(text)).splitlines()
    assert rule == "=" * len(title)
    assert "\n# %%\n" in text
