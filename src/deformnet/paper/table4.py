"""Cost of deformable layers in whole networks (Dai et al. 2017, Table 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet._files import write_json
from deformnet._text import Table
from deformnet.analysis import count_flops
from deformnet.paper.cases import (
    Case,
    Networks,
    build,
    case,
    count_parameters,
    forward,
    require_sound,
)
from deformnet.paper.measuring import (
    Comparison,
    Conditions,
    autocast,
    running,
    side_by_side,
    spread,
)
from deformnet.paper.settings import Table4Network, TimingOptions
from deformnet.tasks.predictor import Predictor, Prepared

# Seconds on a K40, plain and deformable: "net forward" and "runtime".
_PAPER: dict[Table4Network, tuple[tuple[float, float], tuple[float, float]]] = {
    "deeplab-cityscapes": ((0.610, 0.656), (0.650, 0.696)),
    "deeplab-voc": ((0.084, 0.088), (0.094, 0.098)),
    "class-aware-rpn": ((0.142, 0.152), (0.323, 0.334)),
    "faster-rcnn": ((0.147, 0.192), (0.190, 0.234)),
    "rfcn": ((0.143, 0.169), (0.170, 0.193)),
}


class RatedComparison(Comparison):
    """A comparison with the ratio of the paper."""

    paper_ratio: float


class TimedRow(TypedDict):
    """A measured row of Table 4.

    Attributes:
        photo, image: height and width before and after resizing.
        boxes: number of boxes that a detector scores; None for DeepLab.
        parameters, flops: of the "plain" and the "deformable" network.
        forward, whole: seconds of the network alone, and of a predictor.
    """

    network: Table4Network
    photo: list[int]
    image: list[int]
    boxes: int | None
    parameters: dict[str, int]
    flops: dict[str, int]
    forward: RatedComparison
    whole: RatedComparison


class Report(TypedDict):
    """Content of the JSON file."""

    conditions: Conditions
    rows: list[TimedRow]


def run_table4(
    options: TimingOptions, networks: Sequence[Table4Network], out: Path | None
) -> Report:
    """Measure networks, print them as a table, and write the numbers to a file.

    Forward is the network alone, from a normalized image on its device to logits or boxes. Whole is
    a predictor with an image in memory: resizing, normalization, forward, and non-maximum
    suppression, or upsampling to the size of the image and argmax.

    Raises:
        UserError: if there are no networks or no such device, or if `out` is a folder or a
            file other than earlier results.
        FloatingPointError, RuntimeError: if the output of a network is not worth timing.
    """
    if not networks:
        raise UserError("expected at least one network, but got none")
    with running(options, out, Report.__required_keys__) as (device, conditions):
        shown = tqdm(networks, disable=None, leave=False)
        rows = [_measure(network, options, device) for network in shown]
    report: Report = {"conditions": conditions, "rows": rows}
    print(f"\n{_table(rows)}\n\n{_summary(rows)}")
    if out is not None:
        write_json(out, report)
    return report


def _measure(network: Table4Network, options: TimingOptions, device: torch.device) -> TimedRow:
    chosen = case(network, options)
    networks = build(chosen, device)
    with autocast(options):  # as in evaluation
        return _compare(network, chosen, networks, options)


def _compare(
    network: Table4Network, chosen: Case, networks: Networks, options: TimingOptions
) -> TimedRow:
    plain, deformable = networks.plain, networks.deformable
    prepared, photo = networks.prepared, networks.photo
    flops, parameters, boxes = {}, {}, None
    for name, predictor in (("plain", plain), ("deformable", deformable)):
        parameters[name] = count_parameters(predictor.model)
        flops[name], output = _count(predictor, prepared)
        require_sound(f"{network}, {name}", output)
        boxes = len(tree_leaves(output)[0]) if predictor.has_boxes else None
    with torch.inference_mode():
        alone = side_by_side(
            lambda: forward(plain, prepared), lambda: forward(deformable, prepared), options
        )
    whole = side_by_side(lambda: plain.predict(photo), lambda: deformable.predict(photo), options)
    paper_forward, paper_whole = (after / before for before, after in _PAPER[network])
    return {
        "network": network,
        "photo": list(chosen.photo),
        "image": list(prepared.size),
        "boxes": boxes,
        "parameters": parameters,
        "flops": flops,
        "forward": {**alone, "paper_ratio": paper_forward},
        "whole": {**whole, "paper_ratio": paper_whole},
    }


@torch.inference_mode()
def _count(predictor: Predictor, prepared: Prepared) -> tuple[int, object]:
    """Return the FLOPs of a forward pass, and its output."""
    outputs: list[object] = []
    flops = count_flops(lambda: outputs.append(forward(predictor, prepared)))
    return flops, outputs[0]


def _table(rows: Sequence[TimedRow]) -> Table:
    return Table(
        "millions of parameters, GFLOPs, and seconds, plain and deformable; in brackets p20-p80",
        (
            *("network", "image", "params", "deform.", "GFLOPs", "deform."),
            *("forward", "ratio", "paper", "whole", "ratio", "paper"),
        ),
        [_cells(row) for row in rows],
    )


def _cells(row: TimedRow) -> list[str]:
    height, width = row["image"]
    cells = [row["network"], f"{height}x{width}"]
    cells += [f"{row['parameters'][kind] / 1e6:.2f}" for kind in ("plain", "deformable")]
    cells += [f"{row['flops'][kind] / 1e9:.1f}" for kind in ("plain", "deformable")]
    for part in ("forward", "whole"):
        times = row[part]
        cells += [f"{times['plain']['median']:.3f}", spread(times["ratio"])]
        cells.append(f"{times['paper_ratio']:.2f}")
    return cells


def _summary(rows: Sequence[TimedRow]) -> str:
    """Return in words how the ratios compare to the paper's."""
    lines = []
    for part in ("forward", "whole"):
        above = [
            row["network"]
            for row in rows
            if row[part]["ratio"]["median"] >= row[part]["paper_ratio"]
        ]
        line = f"{part}: {len(rows) - len(above)} of {len(rows)} ratios are below the paper's"
        lines.append(line + (f"; not {', '.join(above)}" if above else ""))
    return "\n".join(lines)
