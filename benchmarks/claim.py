"""The paper's claim where it can be controlled: deformable against plain as shapes vary more.

    python -m benchmarks.claim OUT [--strengths 0 0.33 0.67 1] [--seeds 0 1 2]

A strength from 0 to 1 sets how far made objects (deformnet.data.shapes) are warped and how much
they differ in size; everything else is equal. At each one a plain network and one with three
deformable layers learn for the same budget: the same images in the same order, the same initial
weights, steps and learning rates. DeepLab is trained at all strengths, R-FCN (whose pooling is
then deformable, too) at the two ends.

The networks are the library's DeepLab and R-FCN, but on a residual network of nine 3x3
convolutions at stride 8 and with a plain loop, so that a run takes two minutes on one core: a
ResNet-18 learns next to nothing in that time, and what has not learned cannot differ. Table 2
comes from the same runs: effective dilation, layer by layer, by size of object.

Runs that are in OUT already are not repeated; a call that was stopped begins again the run that
it was in.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm, trange

from benchmarks.tables import COLOURS, conditions, describe, save_figure
from deformnet.analysis import AnnotatedImage, dilation_statistics
from deformnet.backbones.features import Backbone, deform_last, require_images
from deformnet.data.shapes import SHAPE_CLASSES, Shapes, scene
from deformnet.evaluation import Found, Truth, confusion_matrix, segmentation_scores, voc_ap
from deformnet.models import RFCN, RPN, DeepLab, Target, select
from deformnet.nn import parameter_groups
from deformnet.runs import replacing, write_json

Network = Literal["deeplab", "rfcn"]
Variant = Literal["plain", "deformable"]
NETWORKS: tuple[Network, ...] = ("deeplab", "rfcn")
VARIANTS: tuple[Variant, ...] = ("plain", "deformable")
SCORES: dict[Network, str] = {"deeplab": "mean IoU", "rfcn": "mean AP at IoU 0.5"}
SIZES = ("small", "medium", "large", "background")

DEFORM_LAYERS = 3
# Radius of objects, as a share of the image's side: at strength 0 all have the first, at strength
# 1 they lie between it divided and multiplied by the second.
MEAN_RADIUS, RADIUS_FACTOR = 0.18, 2.45
# Table 2's sizes are those of objects in images of about this side, which ours are taken to have.
PAPER_SIDE = 600
OBJECTS = SHAPE_CLASSES[1:]


@dataclass(frozen=True)
class Budget:
    """What every run of a network gets.

    Attributes:
        steps, batch: of training; images of a batch.
        lr: the highest of one cycle.
        side: height and width of the images, in pixels.
        images, test: how many there are to train on, and to score on.
        data_seed: of the images.
        offset_lr_scale: of layers that make offsets, the paper's beta.
        weight_decay: of weights.
        clip: largest norm of the gradient.
    """

    steps: int
    batch: int
    lr: float
    side: int = 128
    images: int = 2000
    test: int = 400
    data_seed: int = 0
    offset_lr_scale: float = 0.1
    weight_decay: float = 1e-4
    clip: float = 5.0


BUDGETS: dict[Network, Budget] = {
    "deeplab": Budget(steps=400, batch=16, lr=0.3),
    "rfcn": Budget(steps=600, batch=8, lr=0.05),
}


class Run(NamedTuple):
    """One training."""

    network: Network
    variant: Variant
    strength: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.variant}-strength{self.strength:g}-seed{self.seed}"


class Images(NamedTuple):
    """A made set, in memory."""

    pixels: Tensor
    """uint8 [N, 3, H, W]."""
    labels: Tensor
    """uint8 [N, H, W], class of each pixel."""
    targets: tuple[Target, ...]
    """Objects of each image."""


class SmallResNet(Backbone):
    """Residual blocks of 32, 64 and, in conv5, twice 96 channels, after a 3x3 convolution of 16.

    Its stride is 8, in conv4, too. `deform_layers` of its 3x3 convolutions are deformable.
    """

    name = "small ResNet"

    def __init__(self, deform_layers: int) -> None:
        super().__init__(64, 96, output_stride=16, reduce_channels=None)
        self.stride = 8  # small images need finer maps than backbones of the paper's size offer
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.layer2, self.layer3 = _block(16, 32, stride=2), _block(32, 64, stride=2)
        self.layer4 = nn.Sequential(_block(64, 96), _block(96, 96))
        self._add_reduction()
        deform_last(self, deform_layers, offset_groups=1, modulated=False)

    def conv4(self, images: Tensor) -> Tensor:
        require_images(images)
        return self.layer3(self.layer2(self.stem(images)))

    def conv5(self, conv4: Tensor) -> Tensor:
        return self.layer4(conv4)

    def filter_chain(self) -> tuple[str, ...]:
        return tuple(f"layer4.{block}.{conv}" for block in (1, 0) for conv in ("conv2", "conv1"))

    def freeze_first_stages(self) -> None:
        self.stem.requires_grad_(False)


def _block(channels: int, width: int, stride: int = 1) -> BasicBlock:
    shortcut = None
    if stride != 1 or channels != width:
        conv = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
    return BasicBlock(channels, width, stride, shortcut)


def shapes(strength: float, budget: Budget) -> Shapes:
    """The set of a strength: objects on a calm background, as the budget is small."""
    factor = RADIUS_FACTOR**strength
    return Shapes(
        train=budget.images,
        val=budget.test,
        height=budget.side,
        width=budget.side,
        warp=strength,
        seed=budget.data_seed,
        objects=(1, 3),
        radius=(MEAN_RADIUS / factor, MEAN_RADIUS * factor),
        clutter=0,  # its size would change with that of the objects
        mute=0.75,
    )


@cache
def make_images(drawn_from: Shapes, split: Literal["train", "val"]) -> Images:
    """A split of a made set, as drawn: without the losses of a JPEG."""
    count = drawn_from.train if split == "train" else drawn_from.val
    drawn = [
        scene(drawn_from, split, number)
        for number in trange(count, desc=f"{split} images, warp {drawn_from.warp:g}", disable=None)
    ]
    targets = []
    for one in drawn:
        boxes = torch.tensor([item.box for item in one.objects]).reshape(-1, 4).float()
        labels = torch.tensor([item.label - 1 for item in one.objects], dtype=torch.int64)
        targets.append(Target(boxes, labels))
    pixels = torch.stack([torch.from_numpy(one.image) for one in drawn]).permute(0, 3, 1, 2)
    labels = torch.stack([torch.from_numpy(one.labels) for one in drawn])
    return Images(pixels, labels, tuple(targets))


def build(network: Network, variant: Variant) -> DeepLab | RFCN:
    backbone = SmallResNet(DEFORM_LAYERS if variant == "deformable" else 0)
    if network == "deeplab":
        return DeepLab(backbone, len(SHAPE_CLASSES))
    rpn = RPN(
        backbone.conv4_channels,
        sizes=(24, 48, 96),
        stride=backbone.stride,
        pre_nms=600,
        post_nms=100,
    )
    pool = "average" if variant == "plain" else "deformable"
    return RFCN(backbone, len(OBJECTS), rpn, pool=pool, bins=3)


def normalised(pixels: Tensor) -> Tensor:
    return ((pixels.float() - 128) / 64).contiguous(memory_format=torch.channels_last)


def batches(
    images: Images, budget: Budget, seed: int
) -> Iterator[tuple[Tensor, Tensor, list[Target]]]:
    """Normalised images [N, 3, H, W], labels [N, H, W] and targets of every step.

    Images come in random order, all before any comes again, and half of them are flipped.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while len(order) < budget.steps * budget.batch:
        order = torch.cat((order, torch.randperm(len(images.pixels), generator=generator)))
    for chosen in order.split(budget.batch)[: budget.steps]:
        flip = torch.rand(len(chosen), generator=generator) < 0.5
        pixels, labels = images.pixels[chosen], images.labels[chosen].long()
        pixels[flip], labels[flip] = pixels[flip].flip(-1), labels[flip].flip(-1)
        targets = [
            flipped(images.targets[i], budget.side) if mirrored else images.targets[i]
            for i, mirrored in zip(chosen.tolist(), flip.tolist(), strict=True)
        ]
        yield normalised(pixels), labels, targets


def flipped(target: Target, width: int) -> Target:
    x1, y1, x2, y2 = target.boxes.unbind(1)
    return Target(torch.stack((width - x2, y1, width - x1, y2), 1), target.labels)


def train(run: Run, budget: Budget) -> tuple[DeepLab | RFCN, float]:
    """The trained network, and the median of the processor's seconds that a step took."""
    images = make_images(shapes(run.strength, budget), "train")
    torch.manual_seed(run.seed)
    model = build(run.network, run.variant).to(memory_format=torch.channels_last)
    groups = parameter_groups(
        model,
        budget.lr,
        offset_lr_scale=budget.offset_lr_scale,
        weight_decay=budget.weight_decay,
    )
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=budget.steps,
        cycle_momentum=False,
    )
    # Anchors and RoIs are drawn from the global generator, which both networks begin alike.
    torch.manual_seed(run.seed)
    seconds = []
    steps = batches(images, budget, run.seed)
    with tqdm(steps, desc=run.name, total=budget.steps, disable=None) as bar:
        for pixels, labels, targets in bar:
            begin = time.process_time()
            if isinstance(model, DeepLab):
                losses = model.losses(model(pixels), labels)
            else:
                losses = model.losses(pixels, [(budget.side, budget.side)] * len(pixels), targets)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), budget.clip)
            optimizer.step()
            schedule.step()
            seconds.append(time.process_time() - begin)
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval(), statistics.median(seconds)


@torch.no_grad()
def score(model: DeepLab | RFCN, images: Images) -> float:
    """Mean IoU of the classes and the background, or mean AP at IoU 0.5, in percent."""
    side = images.pixels.shape[-1]
    confusion = confusion_matrix(len(SHAPE_CLASSES))
    found: dict[str, Found] = {}
    for first in range(0, len(images.pixels), 16):
        pixels = normalised(images.pixels[first : first + 16])
        if isinstance(model, DeepLab):
            confusion.update(model(pixels), images.labels[first : first + 16].long())
            continue
        for number, candidates in enumerate(model(pixels, [(side, side)] * len(pixels)), first):
            found[str(number)] = Found(*select(candidates, max_detections=100))
    if isinstance(model, DeepLab):
        return 100 * segmentation_scores(confusion.compute()).mean_iou
    truths = {
        str(number): Truth(target.boxes, target.labels, torch.zeros(len(target.labels)).bool())
        for number, target in enumerate(images.targets)
    }
    return 100 * voc_ap(truths, found, OBJECTS, ious=(0.5,)).mean_ap[0]


def dilations(model: DeepLab | RFCN, images: Images) -> list[dict[str, Any]]:
    """Table 2 on these images, as if they had the size of the paper's."""
    scale, stride = images.pixels.shape[-1] / PAPER_SIDE, model.backbone.stride
    annotated = (
        AnnotatedImage(normalised(pixels[None])[0], target.boxes / scale, scale)
        for pixels, target in zip(images.pixels, images.targets, strict=True)
    )
    return [asdict(row) for row in dilation_statistics(model.backbone, annotated, stride=stride)]


def runs(
    strengths: Sequence[float], seeds: Sequence[int], networks: Sequence[Network] = NETWORKS
) -> list[Run]:
    """All trainings, in an order in which the first ones already say something."""
    ends = (min(strengths), max(strengths))
    return [
        Run(network, variant, strength, seed)
        for seed in seeds
        for network in networks
        for strength in sorted(set(strengths if network == "deeplab" else ends))
        for variant in VARIANTS
    ]


def stored_result(run: Run, budget: Budget, out: Path) -> dict[str, Any] | None:
    """What came of a run; None if it is not finished.

    Raises:
        ValueError: if it had another budget.
    """
    path = _result_path(run, out)
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    if found["budget"] != asdict(budget):
        raise ValueError(f"{path}: wanted a run of {asdict(budget)}, got {found['budget']}")
    return found


def result(run: Run, budget: Budget, out: Path) -> dict[str, Any]:
    """What came of a run, which is trained if it is not finished. Raises as `stored_result`."""
    if (found := stored_result(run, budget, out)) is not None:
        return found
    path = _result_path(run, out)
    model, seconds = train(run, budget)
    test = make_images(shapes(run.strength, budget), "val")
    deformable = run.variant == "deformable"
    found = {
        "run": run._asdict(),
        "budget": asdict(budget),
        "score": score(model, test),
        "seconds per step": seconds,
        "dilation": dilations(model, test) if deformable else None,
    }
    with replacing(path.with_suffix(".pt")) as file:
        torch.save(model.state_dict(), file)
    write_json(path, found)
    return found


def _result_path(run: Run, out: Path) -> Path:
    return out / "runs" / f"{run.name}.json"


def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean and standard deviation (None of a single seed) over seeds."""
    several = list(values.values())
    return {
        "seeds": {str(seed): value for seed, value in sorted(values.items())},
        "mean": statistics.mean(several),
        "std": statistics.stdev(several) if len(several) > 1 else None,
    }


def summarise(results: Sequence[Mapping[str, Any]], network: Network) -> list[dict[str, Any]]:
    """By strength: scores, the gap and Table 2 over the seeds of which both networks are there."""
    by_run = {Run(**one["run"]): one for one in results if one["run"]["network"] == network}
    rows: list[dict[str, Any]] = []
    for strength in sorted({run.strength for run in by_run}):
        of_variant: dict[Variant, dict[int, Mapping[str, Any]]] = {
            variant: {r.seed: by_run[r] for r in by_run if r[1:3] == (variant, strength)}
            for variant in VARIANTS
        }
        plain, deformable = of_variant["plain"], of_variant["deformable"]
        seeds = sorted(plain.keys() & deformable.keys())
        if not seeds:
            continue
        row: dict[str, Any] = {"strength": strength}
        for variant, found in of_variant.items():
            row[variant] = over_seeds({seed: found[seed]["score"] for seed in seeds})
            times = [found[seed]["seconds per step"] for seed in seeds]
            row[f"{variant} seconds per step"] = statistics.median(times)
        row["gap"] = over_seeds({s: deformable[s]["score"] - plain[s]["score"] for s in seeds})
        row["dilation"] = {
            layers[0]["layer"]: {
                size: _size_over_seeds(dict(zip(seeds, [one[size] for one in layers], strict=True)))
                for size in SIZES
            }
            for layers in zip(*(deformable[seed]["dilation"] for seed in seeds), strict=True)
        }
        rows.append(row)
    return rows


def _size_over_seeds(spreads: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Over the seeds, the mean dilation of filters of one kind; None where there are no filters."""
    counts = {spread["count"] for spread in spreads.values()}
    if counts == {0}:
        return None
    (count,) = counts  # all seeds are scored on the same images
    return over_seeds({seed: s["mean"] for seed, s in spreads.items()}) | {"filters": count}


def cell(values: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Each seed's number, and mean and deviation."""
    if values is None:
        return "-"
    each = ", ".join(f"{value:.{digits}f}" for value in values["seeds"].values())
    spread = "" if values["std"] is None else f" +- {values['std']:.{digits}f}"
    return f"{each} ({values['mean']:.{digits}f}{spread})"


def score_table(network: Network, rows: Sequence[Mapping[str, Any]]) -> str:
    times = [statistics.median(row[f"{v} seconds per step"] for row in rows) for v in VARIANTS]
    lines = [
        f"\n{network}: {SCORES[network]} in percent, by seed (mean +- deviation); "
        f"seconds a step: plain {times[0]:.3f}, deformable {times[1]:.3f}\n",
        "| strength | plain | deformable | gap |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = " | ".join(cell(row[name]) for name in (*VARIANTS, "gap"))
        lines.append(f"| {row['strength']:.2g} | {cells} |")
    return "\n".join(lines)


def dilation_table(network: Network, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"\n{network}: effective dilation of filters by what they are centred on, "
        "mean +- deviation over seeds\n",
        "| strength | layer | " + " | ".join(SIZES) + " |",
        "|---" * (2 + len(SIZES)) + "|",
    ]
    for row in rows:
        for layer, sizes in row["dilation"].items():
            cells = " | ".join(
                cell(sizes[size], 2).rpartition("(")[2].rstrip(")") for size in SIZES
            )
            lines.append(f"| {row['strength']:.2g} | {layer} | {cells} |")
    return "\n".join(lines)


def draw(summary: Mapping[Network, Sequence[Mapping[str, Any]]]) -> Figure:
    """A row of panels for each network: scores, gap, and Table 2 at the greatest strength.

    Points are seeds, lines their means, bands and bars one standard deviation.
    """
    figure = Figure((12, 3.6 * len(summary)), layout="constrained")
    panels = figure.subplots(len(summary), 3, squeeze=False)
    for (network, rows), (scores, gap, dilation) in zip(summary.items(), panels, strict=True):
        title = {"deeplab": "DeepLab", "rfcn": "R-FCN"}[network]
        for variant, colour in zip(VARIANTS, (COLOURS[1], COLOURS[0]), strict=True):
            _plot(scores, rows, variant, colour)
        scores.set_title(f"{title}: {SCORES[network]}, %")
        scores.legend()
        _plot(gap, rows, "gap", COLOURS[2])
        gap.axhline(0, color="black", linewidth=1)
        gap.set_title("deformable - plain, points")
        for axes in (scores, gap):
            axes.set_xlabel("strength of warp and scale range")
            axes.set_xticks([row["strength"] for row in rows])
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        _plot_dilation(dilation, rows[-1])
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    at = [row["strength"] for row in rows]
    means = [row[name]["mean"] for row in rows]
    axes.plot(at, means, "-", color=colour, label=name)
    spreads = [row[name]["std"] or 0.0 for row in rows]
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    for x, row in zip(at, rows, strict=True):
        values = row[name]["seeds"].values()
        axes.plot([x] * len(values), list(values), ".", color=colour)


def _plot_dilation(axes: Axes, row: Mapping[str, Any]) -> None:
    layers = row["dilation"].items()
    axes.set_title(f"effective dilation at strength {row['strength']:.2g}")
    for colour, marker, (layer, sizes) in zip(COLOURS[:DEFORM_LAYERS], "osD", layers, strict=True):
        known = [size for size in SIZES if sizes[size]]
        at = [SIZES.index(size) for size in known]
        means = [sizes[size]["mean"] for size in known]
        spreads = [sizes[size]["std"] or 0.0 for size in known]
        axes.errorbar(at, means, spreads, fmt=marker, color=colour, capsize=3, label=layer)
        objects = [place for place, size in enumerate(known) if size != "background"]
        axes.plot([at[i] for i in objects], [means[i] for i in objects], color=colour)
    axes.set_xticks(range(len(SIZES)), SIZES)
    axes.set_xlim(-0.5, len(SIZES) - 0.5)
    axes.set_xlabel("filters centred on")
    axes.margins(y=0.3)  # room for the legend
    axes.legend(loc="upper left")


def report(results: Sequence[Mapping[str, Any]], found: Mapping[str, Any], out: Path) -> str:
    """Writes claim.json and claim.png from what is there; returns the tables."""
    summary: dict[Network, list[dict[str, Any]]] = {
        network: rows for network in NETWORKS if (rows := summarise(results, network))
    }
    if not summary:
        return ""
    write_json(out / "claim.json", {**found, "summary": summary, "runs": list(results)})
    save_figure(out / "claim.png", lambda: draw(summary))
    tables = (table(*of) for table in (score_table, dilation_table) for of in summary.items())
    return "\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 1 / 3, 2 / 3, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--steps", type=int, help="of training; fewer than the budget's try it out")
    options = parser.parse_args()
    if not all(0 <= strength <= 1 for strength in options.strengths):
        parser.error(f"argument --strengths: wanted numbers from 0 to 1, got {options.strengths}")
    budgets = dict(BUDGETS)
    if options.steps is not None:
        budgets = {name: replace(budget, steps=options.steps) for name, budget in budgets.items()}
    todo = runs(options.strengths, options.seeds, options.networks)
    try:
        for run in todo:
            stored_result(run, budgets[run.network], options.out)
    except ValueError as error:
        parser.error(str(error))
    found = conditions()
    print(describe(found), flush=True)
    results: list[dict[str, Any]] = []
    tables = ""
    for run in todo:
        results.append(result(run, budgets[run.network], options.out))
        tables = report(results, found, options.out)
    print(tables)


if __name__ == "__main__":
    main()
