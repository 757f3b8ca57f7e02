"""The numbers of the demo, as a table for a terminal and as a page."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deformnet.demo.settings import Demo
from deformnet.inspection.report.page import STYLE
from deformnet.inspection.report.scenes import LARGE, SMALL
from deformnet._files import replacing


class Row(NamedTuple):
    """One line of the table."""

    what: str
    plain: str
    deformable: str
    difference: str


_HEADER = Row("", "plain", "deformable", "difference")


def comparison(metrics: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The lines of the table.

    Args:
        metrics: of "plain" and "deformable", what `train` returns and "sizes", the scores of
            small, medium and large objects.
    """
    plain, deformable = metrics["plain"], metrics["deformable"]
    rows = [_points("mean IoU", plain["mean_iou"], deformable["mean_iou"])]
    for size, scores in plain["sizes"].items():
        ious = scores["mean_iou"], deformable["sizes"][size]["mean_iou"]
        rows.append(_points(f"IoU of {scores['objects']} {size} objects", *ious))
    rows.append(_ratio("parameters", "{:,.0f}", plain["parameters"], deformable["parameters"]))
    # One after the other on a machine that may be busy: no difference to be drawn from these.
    paces = [_text(run["seconds_per_iteration"], "{:.3f}") for run in (plain, deformable)]
    rows.append(Row("seconds per step", paces[0], paces[1], "-"))
    return rows


def footnote(demo: Demo) -> str:
    """What must be known to read the table."""
    return (
        f"One training run of each network: an illustration, not a measurement (seed {demo.seed}; "
        "other seeds give other differences)."
    )


def detector_score(metrics: Mapping[str, Any]) -> str:
    """What the detector reached, in a sentence.

    Args:
        metrics: what `train` returns.
    """
    mean = metrics["voc"]["area"]["mean_ap"]["0.5"]
    return f"The detector's mean AP at IoU 0.5 is {_text(mean, '{:.1%}')} (area)."


def text_table(rows: Sequence[Row], note: str) -> str:
    """The table for a terminal."""
    lines = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([row.what.ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], note])


def write_page(
    path: Path, demo: Demo, rows: Sequence[Row], note: str, found: str, machine: str
) -> None:
    """Writes the page, which shows the pictures that lie beside it."""
    page = _PAGE.format(
        style=STYLE,
        small=SMALL,
        large=LARGE,
        iterations=demo.iterations,
        images=demo.images,
        val=demo.val,
        size=demo.size,
        header="".join(f"<th>{cell}</th>" for cell in _HEADER),
        rows="\n".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        ),
        note=html.escape(note),
        detector_iterations=demo.detector_iterations,
        found=html.escape(found),
        machine=html.escape(machine),
    )
    with replacing(path) as file:
        file.write(page.encode())


def _points(what: str, plain: float | None, deformable: float | None) -> Row:
    """Shares, in percent, and how many points apart they are."""
    apart = "-" if plain is None or deformable is None else f"{100 * (deformable - plain):+.1f}"
    return Row(what, _text(plain, "{:.1%}"), _text(deformable, "{:.1%}"), apart)


def _ratio(what: str, form: str, plain: float | None, deformable: float | None) -> Row:
    """Amounts, and how much more one is."""
    more = "-" if plain is None or deformable is None else f"{deformable / plain - 1:+.1%}"
    return Row(what, _text(plain, form), _text(deformable, form), more)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>deformnet: plain and deformable, side by side</title>
<style>
{style}  tbody tr:first-child td {{ font-weight: 600; }}
</style>
</head>
<body>
<h1>Plain and deformable, side by side</h1>
<p>Two DeepLab networks on a ResNet-18, from random weights, learned to segment shapes:
{iterations} iterations each on the same {images} made images of {size}&times;{size} pixels. In one
of them the last three 3&times;3 convolutions are deformable; nothing else differs. The scores are
those of {val} images that neither has seen.</p>
<table>
<thead><tr>{header}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="note">{note} Small objects cover less than {small:.0%} of the image,
large ones more than {large:.0%}. {machine}.</p>

<h2>What they predict</h2>
<p>The first of the images that were scored, in their order.</p>
<img src="predictions.png" alt="Images, truth, and the predictions of both networks">

<h2>Where they look</h2>
<p>A unit at the top of the network (cross) samples the map below it at nine points, each of these
the next map at nine, and so on: 729 points for three 3&times;3 layers. In the plain network they
form the same grid everywhere, most of them on one another; the deformable one can move each of
them (Dai et al. 2017, Figure 6), which so short a training has only begun. Each row of three shows
one unit on the background, one on a small and one on a large object. Faint points lie outside the
map, where there is nothing to read.</p>
<img src="sampling.png" alt="Sampling locations of units in both networks">

<h2>What a detector pools</h2>
<p>An R-FCN with deformable pooling, {detector_iterations} iterations from random weights. It
divides each box into 3&times;3 bins, each of which votes for the class; offsets can move the bins
to the parts of the object (Figure 7). After so short a training the bins have left the grid in
much the same way everywhere, the scores are low and few classes are found. Shown is the best
detection of each of the first images in which it is right. {found}</p>
<img src="parts.png" alt="Detections with their bins, moved by the offsets">
</body>
</html>
"""
