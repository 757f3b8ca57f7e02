"""How Sphinx makes the pages: `make docs`."""

import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx_gallery.scrapers import figure_rst
from sphinx_gallery.sorting import FileNameSortKey

import deformnet

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "deformnet"
author = "the deformnet developers"
release = version = deformnet.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "images", "gallery/README.rst"]

html_theme = "furo"
html_title = f"deformnet {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

# A name in single backticks is a link where it is known, and plain code elsewhere.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # No page of another project is fetched, so their names have no target; nor have our aliases.
    ("py:.*", r"(torch|torchvision|lightning|pl|nn|np|numpy|matplotlib|PIL|pathlib|collections|tyro)\..*"),
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
add_module_names = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3


def shown_figures(block: tuple[Any, ...], block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """The figures that a cell of the gallery made, pyplot's or not."""
    seen = block_vars.setdefault("seen_figures", [])
    paths = []
    for value in block_vars["example_globals"].values():
        if isinstance(value, Figure) and not any(value is figure for figure in seen):
            seen.append(value)
            path = next(block_vars["image_path_iterator"])
            value.savefig(path, dpi=130, facecolor="white")
            paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"])


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/",
    "within_subsection_order": FileNameSortKey,
    "image_scrapers": (shown_figures,),
    "abort_on_example_error": True,
    "capture_repr": (),
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 0,
}

# Lines that one source says for two readers: on the hub where the files lie, and here.
_LINKS = {
    "../README.md#measured": "results.md",
    "../docs/": "",
    "docs/": "",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
}


def relink(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Links of files outside this folder, as they are from a page in it."""

    def moved(match: re.Match[str]) -> str:
        for old, new in _LINKS.items():
            if match[1].startswith(old) and not match[1].startswith("docs/images"):
                return f"]({new}{match[1].removeprefix(old)})"
        return match[0]

    content[0] = re.sub(r"(?<!!)\]\(([^)]*)\)", lambda m: moved(m), content[0])


def fences(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Blocks between ``` in docstrings, as reStructuredText has them."""
    result, inside = [], False
    for line in lines:
        if line.strip().startswith("```"):
            inside = not inside
            result += ["", "::", ""] if inside else [""]
        else:
            result.append(f"    {line}" if inside else line)
    lines[:] = result


def make_parts(app: Sphinx) -> None:
    """What is computed for the pages: pictures of the rules, and the help of every command."""
    import commands
    import pictures

    made = HERE / "_made"
    made.mkdir(exist_ok=True)
    pictures.make(made)
    (made / "commands.md").write_text(commands.page(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    app.connect("builder-inited", make_parts, priority=100)
    app.connect("include-read", relink)
    app.connect("autodoc-process-docstring", fences, priority=100)
