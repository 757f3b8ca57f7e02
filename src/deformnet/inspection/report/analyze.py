"""Analysis of a trained run over a data set, written as a page.

```
OUT/
  index.html        the page
  analysis.json     the numbers
  *.png, *.svg      the figures
```
"""

from pathlib import Path

from deformnet._errors import UserError, require_at_least
from deformnet._files import refuse_overwrite, require_writable
from deformnet.inspection.report.findings import Findings
from deformnet.inspection.report.images import AnalyzedImages
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.sections import (
    bins_section,
    convolution_sections,
    cost_section,
    scores_section,
)
from deformnet.inspection.runs import open_runs
from deformnet.inspection.settings import Analysis


def analyze(
    run: Path,
    data: Path,
    out: Path,
    analysis: Analysis = Analysis(),  # noqa: B008 (frozen)
) -> dict[str, object]:
    """Write the figures, the numbers and the page of a run.

    Args:
        run: run folder of DeepLab or a detector with deformable layers.
        data: data set folder with the classes of the training data.
        out: folder for the results; files of an earlier call are replaced.
        analysis: images and objects to analyze, and the baseline.
    Returns:
        The content of analysis.json.
    Raises:
        FileNotFoundError: if a run or the data are missing.
        UserError: if the run is of a classifier or has no deformable layers, the data have other
            classes or no objects, or an argument is out of range.
    """
    require_at_least(analysis, 1, "images")
    refuse_overwrite(out, [run, data])
    opened, compared = open_runs(run, analysis.baseline, analysis.device)
    if not opened.task.localizes:
        raise UserError(
            f"{run}: expected a network that locates objects, but got a {opened.network}"
        )
    source = AnalyzedImages(opened, data, analysis)
    require_writable(out)
    findings = Findings(run, data, analysis, source, out)
    network = UnitRecorder("deformable", opened)
    other = None if compared is None else UnitRecorder("baseline", compared)
    if len(source) == len(source.annotated):
        findings.sections.append(scores_section(findings, opened))
    if opened.deformable:
        findings.sections += convolution_sections(findings, network, other)
    if opened.predictor.pooling is not None:
        findings.sections.append(bins_section(findings, opened))
    findings.sections.append(cost_section(findings, opened, compared))
    return findings.write()
