"""Looks at a trained run over a data set and puts what it shows on a page.

```
OUT/
  index.html        the page
  analysis.json     the numbers
  *.png, *.svg      the pictures
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deformnet.inference import open_predictor
from deformnet.inspection.report.findings import Findings
from deformnet.inspection.report.network import Network, Predictor
from deformnet.inspection.report.sections import section_of_cost, section_of_parts, sections_of_filters
from deformnet.inspection.report.source import Source


def analyse(
    run: Path,
    data: Path,
    out: Path,
    *,
    split: str = "val",
    plain: Path | None = None,
    images: int | None = None,
    objects: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Writes the pictures, the numbers and the page of a run.

    Args:
        run: folder of a trained DeepLab or detector with deformable layers.
        data: annotated images with the classes that it was trained on.
        out: folder of the results; files of an earlier call are replaced.
        split: of the data.
        plain: folder of the same network without deformable layers, to compare with.
        images: only so many of the split, from its beginning.
        objects: of label maps: classes whose connected regions are objects; nothing takes all but
            those that are known not to be single things, such as sky or road.
        device: where to compute; None takes a GPU if there is one.
    Returns:
        The content of analysis.json.
    Raises:
        FileNotFoundError: if a run or the data are not there.
        ValueError: if the run is of another network or has no deformable layers, the data have
            other classes or no objects, or an argument is out of its range.
    """
    if images is not None and images < 1:
        raise ValueError(f"images: wanted at least 1, got {images}")
    predictor = _open(run, device)
    network = Network("deformable", predictor)
    if not network.deforms and network.pooling is None:
        raise ValueError(f"{run}: has no deformable layers, there is nothing to see")
    twin = None if plain is None else _open_twin(plain, run, predictor, device)
    source = Source(predictor, run, data, split, images, objects)
    findings = Findings(run, plain, data, split, source, out)
    if network.deforms:
        findings.sections += sections_of_filters(findings, network, twin)
    if network.pooling is not None:
        findings.sections.append(section_of_parts(findings, predictor))
    findings.sections.append(section_of_cost(findings, network, twin))
    return findings.write()


def _open(run: Path, device: torch.device | str | None) -> Predictor:
    predictor = open_predictor(run, device=device)
    if not isinstance(predictor, Predictor):
        raise ValueError(f"{run}: wanted a run of deeplab or of a detector, got a classifier's")
    return predictor


def _open_twin(
    plain: Path, run: Path, predictor: Predictor, device: torch.device | str | None
) -> Network:
    twin = _open(plain, device)
    network = Network("plain", twin)
    if network.deforms or network.pooling is not None:
        raise ValueError(f"{plain}: wanted a plain network, it has deformable layers")
    if type(twin.model) is not type(predictor.model) or twin.classes != predictor.classes:
        raise ValueError(f"{plain}: wanted the same kind of network and classes as {run}")
    return network
