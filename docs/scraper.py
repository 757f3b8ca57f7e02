"""Which pictures the gallery takes from a script."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def shown_figures(
    block: tuple[Any, ...], block_vars: dict[str, Any], gallery_conf: dict[str, Any]
) -> str:
    """The figures that a cell made and named, whether by pyplot or not."""
    seen = block_vars.setdefault("seen_figures", [])
    paths = []
    for value in block_vars["example_globals"].values():
        if isinstance(value, Figure) and not any(value is figure for figure in seen):
            seen.append(value)
            path = next(block_vars["image_path_iterator"])
            value.savefig(path, dpi=130, facecolor="white")
            paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"])
