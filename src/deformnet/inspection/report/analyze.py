"""Analysis of a trained run over a data set, written as a page.

```
OUT/
  index.html        the page
  analysis.json     the numbers
  *.png, *.svg      the figures
```
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from deformnet._errors import UserError
from deformnet.inspection.report.findings import Findings
from deformnet.inspection.report.images import AnalyzedImages
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.sections import bins_section, convolution_sections, cost_section
from deformnet.inspection.runs import open_runs


def analyze(
    run: Path,
    data: Path,
    out: Path,
    *,
    split: str = "val",
    baseline: Path | None = None,
    images: int | None = None,
    objects: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, object]:
    """Write the figures, the numbers and the page of a run.

    Args:
        run: run folder of DeepLab or a detector with deformable layers.
        data: data set folder with the classes of the training data.
        out: folder for the results; files of an earlier call are replaced.
        split: split of the data set.
        baseline: run folder of the same network without deformable layers, for comparison.
        images: number of images to analyze, from the start of the split; None analyzes all.
        objects: for label maps: classes whose connected regions are objects; by default all but
            stuff such as sky or road.
        device: device to compute on; None uses a GPU if there is one.
    Returns:
        The content of analysis.json.
    Raises:
        FileNotFoundError: if a run or the data are missing.
        UserError: if the run is of a classifier or has no deformable layers, the data have other
            classes or no objects, or an argument is out of range.
    """
    if images is not None and images < 1:
        raise UserError(f"expected images to be at least 1, but got {images}")
    opened, compared = open_runs(run, baseline, device)
    if not opened.task.localizes:
        raise UserError(
            f"{run}: expected a network that locates objects, but got a {opened.network}"
        )
    source = AnalyzedImages(opened, data, split, images, objects)
    findings = Findings(run, baseline, data, split, source, out)
    network = UnitRecorder("deformable", opened)
    other = None if compared is None else UnitRecorder("baseline", compared)
    if opened.deformable:
        findings.sections += convolution_sections(findings, network, other)
    if opened.predictor.pooling is not None:
        findings.sections.append(bins_section(findings, opened))
    findings.sections.append(cost_section(findings, opened, compared))
    return findings.write()
