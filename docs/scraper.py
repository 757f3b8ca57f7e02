"""Selects the figures of a gallery script."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def shown_figures(
    block: tuple[Any, ...], block_vars: dict[str, Any], gallery_conf: dict[str, Any]
) -> str:
    """Saves the figures that a cell assigned to variables, with or without pyplot."""
    seen = block_vars.setdefault("seen_figures", [])
    paths = []
    for value in block_vars["example_globals"].values():
        if isinstance(value, Figure) and not any(value is figure for figure in seen):
            seen.append(value)
            path = next(block_vars["image_path_iterator"])
            value.savefig(path, dpi=130, facecolor="white")
            paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"])
