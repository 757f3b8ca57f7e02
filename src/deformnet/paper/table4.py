"""What deformable layers cost in a network as a whole (Dai et al. 2017, Table 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deformnet._files import write_json
from deformnet.analysis import count_flops
from deformnet.inference import DetectionPredictor, SegmentationPredictor, detection_predictor
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Candidates, Detector
from deformnet.paper.cases import build, case, forward, prepared, require_sound
from deformnet.paper.measuring import (
    condition_lines,
    conditions,
    require_writable,
    running,
    side_by_side,
    spread,
)
from deformnet.paper.settings import Table4Network, TimingOptions
from deformnet.recipes import DeepLabRecipe, DetectorRecipe

# Seconds on a K40, plain and deformable: "net forward" and "runtime".
_PAPER: dict[Table4Network, tuple[tuple[float, float], tuple[float, float]]] = {
    "deeplab-cityscapes": ((0.610, 0.656), (0.650, 0.696)),
    "deeplab-voc": ((0.084, 0.088), (0.094, 0.098)),
    "class-aware-rpn": ((0.142, 0.152), (0.323, 0.334)),
    "faster-rcnn": ((0.147, 0.192), (0.190, 0.234)),
    "rfcn": ((0.143, 0.169), (0.170, 0.193)),
}

_TIMES = f"{'plain':>8} {'deform./plain':16} {'paper':>6}"
_HEADING = (
    f"{'':28} {'parameters, M':>16} {'GFLOP':>17} {'forward, s':^32} {'whole, s':^32}".rstrip()
    + f"\n{'network':18} {'image':>9} {'plain':>8} {'deform.':>7} {'plain':>8} {'deform.':>8} "
    f"{_TIMES} {_TIMES}"
)
_STEPS = ("building", "counting", "timing forward", "timing the whole")


def run_table4(
    bench: TimingOptions, rows: Sequence[Table4Network], out: Path | None
) -> dict[str, Any]:
    """Measures the rows, prints each as it is done, and writes all of them into a file.

    Forward is the network alone, from a normalised image on its device to scores or boxes. Whole is
    what a predictor does with an image in memory: resize, normalise, forward, and suppress boxes or
    bring scores to the size of the image and take the best.

    Args:
        bench: how to measure.
        rows: which.
        out: JSON file; None for none.
    Returns:
        What the file holds: {"conditions": ..., "rows": [...]}. Of a row: "parameters" and "flops"
        as {"plain": int, "deformable": int}; "forward" and "whole" with the seconds of both
        networks, their "ratio", and the "paper_ratio"; and how many "boxes" a detector judges.
    Raises:
        ValueError: if there are no rows or no such device, or if `out` is a folder.
        FloatingPointError, RuntimeError: if a network gives nothing that is worth timing.
    """
    require_writable(out)
    if not rows:
        raise ValueError("rows: name at least one network")
    with running(bench) as device:
        found = {"conditions": conditions(bench), "rows": []}
        print("\n".join([*condition_lines(found["conditions"]), "", _HEADING]), flush=True)
        with tqdm(total=len(rows) * len(_STEPS), disable=None, leave=False) as bar:
            for row in rows:
                found["rows"].append(_measure(row, bench, device, bar))
                bar.write(_line(found["rows"][-1]))
    print("\n".join(["", *_summary(found["rows"])]))
    if out is not None:
        write_json(out, found)
    return found


def _measure(
    row: Table4Network, bench: TimingOptions, device: torch.device, bar: tqdm
) -> dict[str, Any]:
    steps = iter(_STEPS)

    def next_step() -> None:
        bar.set_description(f"{row}: {next(steps)}")

    next_step()
    chosen = case(row, bench.backbone, bench.scale)
    photo = torch.randint(256, (3, *chosen.photo), dtype=torch.uint8)
    images = prepared(chosen, photo)[None].to(device, memory_format=torch.channels_last)
    models = build(chosen, images)
    bar.update()

    next_step()
    flops, boxes = {}, None
    for name, model in zip(("plain", "deformable"), models, strict=True):
        flops[name], output = _count(model, images)
        require_sound(f"{row}, {name}", output)
        boxes = None if isinstance(output, Tensor) else len(output[0].boxes)
    bar.update()

    next_step()
    with torch.inference_mode():
        alone = side_by_side(forward(models[0], images), forward(models[1], images), bench)
    bar.update()

    next_step()
    recipes = (chosen.plain, chosen.deformable)
    plain, deformable = (
        _predictor(recipe, model, chosen.classes, device)
        for recipe, model in zip(recipes, models, strict=True)
    )
    whole = side_by_side(lambda: plain(photo), lambda: deformable(photo), bench)
    bar.update()

    paper_forward, paper_whole = _PAPER[row]
    return {
        "network": row,
        "photo": list(chosen.photo),
        "image": list(images.shape[2:]),
        "boxes": boxes,
        "parameters": {"plain": _parameters(models[0]), "deformable": _parameters(models[1])},
        "flops": flops,
        "forward": {**alone, "paper_ratio": _ratio(paper_forward)},
        "whole": {**whole, "paper_ratio": _ratio(paper_whole)},
    }


@torch.inference_mode()
def _count(model: DeepLab | Detector, images: Tensor) -> tuple[int, Tensor | list[Candidates]]:
    """The operations of a forward pass, and its output."""
    outputs: list[Tensor | list[Candidates]] = []
    flops = count_flops(lambda: outputs.append(forward(model, images)()))
    return flops, outputs[0]


def _predictor(
    recipe: DeepLabRecipe | DetectorRecipe,
    model: DeepLab | Detector,
    num_classes: int,
    device: torch.device,
) -> SegmentationPredictor | DetectionPredictor:
    classes = tuple(str(label) for label in range(num_classes))
    if isinstance(recipe, DeepLabRecipe):
        assert isinstance(model, DeepLab)
        return SegmentationPredictor(recipe, model, classes, device)
    assert isinstance(model, Detector)
    return detection_predictor(recipe, model, classes, device=device)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _ratio(seconds: tuple[float, float]) -> float:
    plain, deformable = seconds
    return deformable / plain


def _line(row: dict[str, Any]) -> str:
    """A row of the table, under `_HEADING`."""
    height, width = row["image"]
    cells = [f"{row['network']:18} {f'{height}x{width}':>9}"]
    parameters, flops = row["parameters"], row["flops"]
    cells.append(f"{parameters['plain'] / 1e6:8.2f} {parameters['deformable'] / 1e6:7.2f}")
    cells.append(f"{flops['plain'] / 1e9:8.1f} {flops['deformable'] / 1e9:8.1f}")
    for part in ("forward", "whole"):
        times = row[part]
        cells.append(
            f"{times['plain']['median']:8.3f} {spread(times['ratio']):16} "
            f"{times['paper_ratio']:6.2f}"
        )
    return " ".join(cells)


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table says in words."""
    lines = []
    for part in ("forward", "whole"):
        above = [
            row["network"]
            for row in rows
            if row[part]["ratio"]["median"] >= row[part]["paper_ratio"]
        ]
        line = f"{part}: {len(rows) - len(above)} of {len(rows)} ratios are below the paper's"
        lines.append(line + (f"; not {', '.join(above)}" if above else ""))
    return lines
