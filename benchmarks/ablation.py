"""Tables 1 and 3 of the paper at small scale, from random weights, on small data sets.

    python -m benchmarks.ablation camvid DIR OUT [--backbone resnet50] [--iterations 3000]
    python -m benchmarks.ablation nuclei DIR OUT ...

CamVid (VOC layout) with DeepLab at 480x360, test mean IoU; nuclei (COCO layout) with R-FCN, AP.
Rows: 0, 1, 2, 3 and 6 deformable layers; dilation 4, 6 and 8 without any; for R-FCN also
deformable pooling, alone and with three layers. All rows have the same budget. Finished runs in
OUT are reused; an interrupted run resumes. Prints the mean and standard deviation over the seeds,
compared with the paper.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deformnet._files import write_json
from deformnet.engine import evaluate, train
from deformnet.paper.rows import find_rows
from deformnet.recipes import (
    BACKBONES,
    BackboneName,
    DeepLabRecipe,
    DeformLayers,
    Recipe,
    RFCNRecipe,
)

Precision = Literal["32-true", "bf16-mixed"]
LAYERS: tuple[DeformLayers, ...] = get_args(DeformLayers)
DILATIONS = (4, 6, 8)


@dataclass(frozen=True)
class Study:
    """Experiments on a data set.

    Attributes:
        base: recipe of the plain network.
        train, test: splits.
        network: part of the names of the paper's rows.
        metrics: names of the scores, as in the paper's tables.
    """

    base: DeepLabRecipe | RFCNRecipe
    train: str
    test: str
    network: str
    metrics: tuple[str, ...]


def study(
    name: str,
    backbone: BackboneName,
    iterations: int,
    batch: int,
    short_side: int | None,
    precision: Precision,
) -> Study:
    """The table of a data set.

    Offsets learn at a tenth of the learning rate and gradients are clipped, as training from random
    weights requires.
    """
    side = short_side or {"camvid": 360, "nuclei": 512}[name]
    common: dict[str, Any] = {
        "backbone": backbone,
        "deform_layers": 0,
        "batch": batch,
        "iterations": iterations,
        "offset_lr_scale": 0.1,
        "clip": 10.0,
        "lr": 0.02,
        "warmup": iterations // 30,
        "short_side": side,
        "precision": precision,
    }
    if name == "camvid":
        recipe = DeepLabRecipe(max_side=None, **common)
        return Study(recipe, "train", "test", "deeplab-cityscapes", ("mean IoU",))
    recipe = RFCNRecipe(
        pool="average",
        max_side=2 * side,
        anchor_sizes=tuple(side // parts for parts in (32, 16, 8, 4)),  # 16 to 128 at 512 pixels
        max_detections=100,
        **common,
    )
    return Study(recipe, "train_small", "val_small", "rfcn", ("AP", "AP50"))


def variants(chosen: Study) -> dict[str, Recipe]:
    """Recipes by the names of the paper's rows."""
    base = chosen.base
    found: dict[str, Recipe] = {
        f"table1/{chosen.network}-{layers}": dataclasses.replace(base, deform_layers=layers)
        for layers in LAYERS
    }
    for dilation in DILATIONS:
        name = f"table3/{chosen.network}-atrous-{dilation}"
        found[name] = dataclasses.replace(base, dilation=dilation)
    if isinstance(base, RFCNRecipe):
        pooling = dataclasses.replace(base, pool="deformable")
        found[f"table3/{chosen.network}-pool"] = pooling
        found[f"table3/{chosen.network}-conv-pool"] = dataclasses.replace(pooling, deform_layers=3)
    return found


def line(name: str, found: Sequence[Mapping[str, float]]) -> str:
    """A row of the table."""
    (row,) = find_rows([name])
    cells = []
    for metric in found[0]:
        values = [one[metric] for one in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{value:.1f}" for value in values)
        cells.append(f"{metric} {each} ({statistics.mean(values):.1f} +- {spread:.1f})")
    paper = " / ".join(f"{value:.1f}" for value in row.paper.values())
    return f"| {name.partition('-')[2]} | {' | '.join(cells)} | {paper} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", choices=("camvid", "nuclei"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--short-side", type=int, help="pixels; smaller values are faster than the study"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="32-true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    chosen = study(
        options.study,
        options.backbone,
        options.iterations,
        options.batch,
        options.short_side,
        options.precision,
    )
    table: dict[str, list[dict[str, float]]] = {}
    for name, recipe in variants(chosen).items():
        for seed in options.seeds:
            run = options.out / f"{name.replace('/', '-')}-seed{seed}"
            seeded = dataclasses.replace(recipe, seed=seed)
            train(seeded, options.data, run, split=chosen.train, val_split=None)
            scores = evaluate(run, options.data, chosen.test).scores
            assert scores is not None
            percent = scores.summary
            table.setdefault(name, []).append({m: percent[m] or 0.0 for m in chosen.metrics})
        write_json(options.out / "table.json", table)
        print(line(name, table[name]), flush=True)


if __name__ == "__main__":
    main()
