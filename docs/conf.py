"""Sphinx configuration for `make docs`."""

import sys
import warnings
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

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
exclude_patterns = ["_build", "_generated", "images"]

html_theme = "furo"
html_title = f"deformnet {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_math_renderer = "mathml"

# A name in single backticks is a link if it is known, and plain code otherwise.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Inventories of other projects are not downloaded, so their names have no targets.
    (
        "py:.*",
        r"(abc|collections|huggingface_hub|lightning|matplotlib|numpy|pathlib|PIL|nn|torch\w*)\..*",
    ),
    # Types in public signatures that are not documented themselves.
    ("py:class", r"deformnet\..*"),
    ("py:exc", "UserError|MissingExtraError|UnsavedScores"),
    # Of defaults that Sphinx cannot parse (`=<factory>`), it splits the types at their commas.
    ("py:class", r"dict\[str"),
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # of torch.nn.Module.forward and the like
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False
# "a, b: text" documents two attributes.
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88
add_module_names = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("scraper.shown_figures",),
    "abort_on_example_error": True,
    "capture_repr": (),
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 0,
}


def docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Converts docstrings, plain text with some Markdown, to reStructuredText."""
    # napoleon parses text before a colon in the first line of an attribute's docstring as its type,
    # so insert a blank first line (an escaped space).
    result, inside = [r"\ "] if what in ("attribute", "data", "property") else [], False
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()  # the docstring of the named tuple describes its fields
    for line in lines:
        if line.strip().startswith("```"):
            inside = not inside
            result += ["", "::", ""] if inside else [""]
        elif inside:
            result.append(f"    {line}")
        else:
            result.append(line.replace("|", r"\|"))
    lines[:] = result


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def make_parts(app: Sphinx) -> None:
    """Generates the figures of the rules, and the help texts of all commands."""
    import commands
    import pictures

    generated = HERE / "_generated"
    generated.mkdir(exist_ok=True)
    pictures.make(generated)
    (generated / "commands.md").write_text(commands.page(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    # Browsers support MathML; MathJax would be downloaded whenever a page is opened.
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("builder-inited", make_parts, priority=100)
    app.connect("autodoc-process-docstring", docstring, priority=100)
