"""Sections and numbers of a report, and their files."""

from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from deformnet._files import write_json
from deformnet._text import Table
from deformnet.engine.runs import machine, versions
from deformnet.inspection.pages import write_page
from deformnet.inspection.report.images import AnalyzedImages
from deformnet.inspection.settings import Analysis
from deformnet.visualization import save_figure

_TEMPLATE = Path(__file__).parents[1] / "templates" / "report.html"


@dataclass(frozen=True)
class Picture:
    """A figure beside the page, as name.png and name.svg."""

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page; tables with a title are folded."""

    title: str
    text: str
    content: tuple[Table | Picture, ...]


@dataclass
class Findings:
    """Collects sections and numbers; `write` writes them to files.

    Attributes:
        out: output folder.
        numbers: content of analysis.json, except what was analyzed.
    """

    run: Path
    data: Path
    analysis: Analysis
    images: AnalyzedImages
    out: Path
    sections: list[Section] = field(default_factory=list)
    numbers: dict[str, object] = field(default_factory=dict)

    def picture(self, name: str, figure: Figure, caption: str) -> Picture:
        """Save a figure."""
        for suffix in (".png", ".svg"):
            save_figure(figure, self.out / f"{name}{suffix}")
        return Picture(name, f"{caption} Run {self.run.name}, {self.where}.")

    @property
    def where(self) -> str:
        """The images in words."""
        count, total = len(self.images), len(self.images.annotated)
        which = f"{count} images" if count == total else f"the first {count} of {total} images"
        return f"{which} of {self.analysis.split}"

    def write(self) -> dict[str, object]:
        """Write page and numbers; return the numbers."""
        baseline = self.analysis.baseline
        report: dict[str, object] = {
            "run": str(self.run),
            "baseline": None if baseline is None else str(baseline),
            "data": str(self.data),
            "split": self.analysis.split,
            "images": len(self.images),
            "objects": list(self.images.objects),
            **self.numbers,
            "versions": versions(),
            "machine": machine(),
        }
        write_json(self.out / "analysis.json", report)
        compared = "" if baseline is None else f" Compared to the baseline {baseline}."
        values = {
            "title": f"What {self.run.name} has learned",
            "facts": [
                f"Run {self.run}, analyzed on {self.where} in {self.data}.{compared}",
                "Click a figure to open it as SVG. All numbers are in analysis.json.",
            ],
            "sections": self.sections,
        }
        write_page(self.out / "index.html", _TEMPLATE, values)
        return report
