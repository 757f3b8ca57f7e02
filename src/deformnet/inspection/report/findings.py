"""What is found, as it is written in the end."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from deformnet._files import write_json
from deformnet.engine.runs import machine, versions
from deformnet.inspection.report.page import Picture, Section, write_page
from deformnet.inspection.report.source import Source
from deformnet.visualization import save_figure


@dataclass
class Findings:
    """Sections and numbers as they come; `write` puts them into files.

    Attributes:
        out: the folder.
        numbers: the content of analysis.json, besides what it is about.
    """

    run: Path
    plain: Path | None
    data: Path
    split: str
    source: Source
    out: Path
    sections: list[Section] = dataclasses.field(default_factory=list)
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def picture(self, name: str, figure: Figure, caption: str) -> Picture:
        """Writes a picture."""
        for suffix in (".png", ".svg"):
            save_figure(figure, self.out / f"{name}{suffix}")
        return Picture(name, f"{caption} Run {self.run.name}, {self.where}.")

    @property
    def where(self) -> str:
        """The images, in words."""
        count, all_of = len(self.source), len(self.source.dataset)
        which = f"{count} images" if count == all_of else f"the first {count} of {all_of} images"
        return f"{which} of {self.split}"

    def write(self) -> dict[str, Any]:
        run = {
            "run": str(self.run),
            "plain": None if self.plain is None else str(self.plain),
            "data": str(self.data),
            "split": self.split,
            "images": len(self.source),
            "objects": list(self.source.objects),
        }
        found = {**run, **self.numbers, "versions": versions(), "machine": machine()}
        write_json(self.out / "analysis.json", found)
        beside = "" if self.plain is None else f" Beside it its plain twin, {self.plain}."
        facts = [
            f"Run {self.run}, looked at on {self.where} in {self.data}.{beside}",
            "The numbers are in analysis.json; a click on a picture opens it as SVG.",
        ]
        title = f"What {self.run.name} has learned"
        write_page(self.out / "index.html", title, facts, self.sections)
        return found
