"""The numbers of the demo, as a table for a terminal and as a page."""

from pathlib import Path
from typing import TypedDict

from deformnet._text import Table
from deformnet.demo.settings import Demo
from deformnet.inspection.pages import write_page
from deformnet.inspection.report.scenes import LARGE, SMALL

_TEMPLATE = Path(__file__).parent / "templates" / "demo.html"


class SizeMetrics(TypedDict):
    """Scores of the objects of a size."""

    objects: int
    mean_iou: float | None


class NetworkMetrics(TypedDict):
    """Metrics of a segmentation network that the table shows.

    Attributes:
        sizes: scores of small, medium and large objects.
    """

    mean_iou: float | None
    sizes: dict[str, SizeMetrics]
    parameters: int
    seconds_per_iteration: float | None


def comparison(baseline: NetworkMetrics, deformable: NetworkMetrics) -> Table:
    """Return the metrics of both networks as a table."""
    rows = [_fractions("mean IoU", baseline["mean_iou"], deformable["mean_iou"])]
    for size, scores in baseline["sizes"].items():
        ious = scores["mean_iou"], deformable["sizes"][size]["mean_iou"]
        rows.append(_fractions(f"IoU of {scores['objects']} {size} objects", *ious))
    before, after = baseline["parameters"], deformable["parameters"]
    rows.append(["parameters", f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"])
    # The runs were made one after the other, on a machine that may have been busy.
    seconds = [_text(it["seconds_per_iteration"], "{:.3f}") for it in (baseline, deformable)]
    rows.append(["seconds per iteration", *seconds, "-"])
    return Table("", ("", "baseline", "deformable", "difference"), rows)


def footnote(demo: Demo) -> str:
    """Return the caveat of the table."""
    return (
        f"One training run of each network: an illustration, not a measurement (seed {demo.seed}; "
        "other seeds give other differences)."
    )


def detector_score(mean_ap: float | None) -> str:
    """Return the score of the detector, mAP at IoU 0.5 in percent, as a sentence."""
    return f"The detector reaches {_text(mean_ap, '{:.1f} %')} mAP at IoU 0.5 (area)."


def write_demo_page(path: Path, demo: Demo, table: Table, score: str, machine: str) -> None:
    """Write the page, which shows the figures beside it."""
    values = {
        "title": "Baseline and deformable networks, side by side",
        "demo": demo,
        "header": table.header,
        "rows": table.rows,
        "note": footnote(demo),
        "small": f"{SMALL:.0%}",
        "large": f"{LARGE:.0%}",
        "score": score,
        "machine": machine,
    }
    write_page(path, _TEMPLATE, values)


def _fractions(name: str, baseline: float | None, deformable: float | None) -> list[str]:
    """Return fractions in percent, and their difference in percentage points."""
    difference = None
    if baseline is not None and deformable is not None:
        difference = 100 * (deformable - baseline)
    texts = [_text(value, "{:.1%}") for value in (baseline, deformable)]
    return [name, *texts, _text(difference, "{:+.1f}")]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
