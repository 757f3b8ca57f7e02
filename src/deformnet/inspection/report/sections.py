"""The parts of the page: each looks at the network and says what it saw."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from tqdm import tqdm

from deformnet.analysis import (
    AnnotatedImage,
    LayerDilation,
    LayerHealth,
    ModelCost,
    OffsetObserver,
    dilation_statistics,
    model_cost,
)
from deformnet.data import DetectionDataset
from deformnet.data.base import SegmentationDataset
from deformnet.engine.runs import machine
from deformnet.inference import DetectionPredictor
from deformnet.inspection.report.findings import Findings
from deformnet.inspection.report.network import Network, Predictor
from deformnet.inspection.report.page import Section, Table
from deformnet.inspection.report.parts import find_parts
from deformnet.inspection.report.scenes import LARGE, SMALL, Scene, Unit, choose_scenes, units_of
from deformnet.inspection.report.source import Source
from deformnet.visualization import (
    SampledUnit,
    bins_figure,
    contact_sheet_figure,
    dilation_cell,
    dilation_figure,
    receptive_field_figure,
    sampling_figure,
    two_layer_figure,
)

_SCENES, _PARTS, _SHEET = 2, 6, 24  # images in the pictures


def sections_of_filters(
    findings: Findings, network: Network, twin: Network | None
) -> Iterator[Section]:
    """All that needs deformable convolutions."""
    source = findings.source
    rows, health = _statistics(network, source)
    findings.numbers["effective_dilation"] = [asdict(row) for row in rows]
    findings.numbers["offset_health"] = [asdict(layer) for layer in health]
    scenes = _find_scenes(network, source)
    findings.numbers["scenes"] = [
        {"image": source.name(scene.index), "units": [asdict(unit) for unit in scene.units]}
        for scene in scenes
    ]
    if scenes:
        yield from _sections_of_scenes(findings, network, twin, scenes)
    yield _section_of_dilation(findings, rows)
    yield _section_of_health(health)
    yield _section_of_sheet(findings, network)


def _statistics(network: Network, source: Source) -> tuple[list[LayerDilation], list[LayerHealth]]:
    """Effective dilation and shifts over all images."""

    def annotated() -> Iterator[AnnotatedImage]:
        for image, contents in source.contents("effective dilation"):
            prepared = network.predictor.prepare(image)
            scale = math.sqrt(math.prod(prepared.scale))
            yield AnnotatedImage(prepared.input[0], contents.boxes(), scale)

    with OffsetObserver(network.model) as observer:
        rows = dilation_statistics(network.model, annotated(), call=network.model.backbone)
    return rows, observer.health()


def _find_scenes(network: Network, source: Source) -> list[Scene]:
    found = (
        (contents, network.grid(image)) for image, contents in source.contents("units to look at")
    )
    return choose_scenes(found, _SCENES)


def _sections_of_scenes(
    findings: Findings,
    network: Network,
    twin: Network | None,
    scenes: Sequence[Scene],
) -> Iterator[Section]:
    """Figures 5 and 6, and effective receptive fields."""
    source = findings.source
    looks: dict[str, list[SampledUnit]] = {"plain": [], "deformable": []}
    for scene in scenes:
        image = source[scene.index][0]
        looks["deformable"] += network.looks(image, scene.units)
        looks["plain"] += (
            network.looks(image, scene.units, at_rest=True)
            if twin is None
            else twin.looks(image, _same_places(network, twin, image, scene.units))
        )
    names = " and ".join(source.name(scene.index) for scene in scenes)
    regular = (
        "Plain: the same filters without their offsets." if twin is None else "Plain: its twin."
    )
    if len(network.layers) > 1:
        # Of each scene's three units two lie on objects; best seen are those far from each other.
        ours = looks["deformable"]
        best = max(
            range(len(scenes)),
            key=lambda k: math.dist(ours[3 * k + 1].centre, ours[3 * k + 2].centre),
        )
        pair = {name: some[3 * best + 1 : 3 * best + 3] for name, some in looks.items()}
        yield Section(
            "Receptive fields in two layers (Figure 5)",
            "A unit at the top samples the map below at nine points, and each of these the next "
            "map at nine. Without offsets the pattern is the same on every object; offsets fit it "
            "to scale and shape.",
            [
                findings.picture(
                    "fields",
                    two_layer_figure(pair),
                    f"A unit on a small and one on a large object of "
                    f"{source.name(scenes[best].index)}; from top to bottom the units, their "
                    f"samples in the map below, and the samples of these in the next. Highlighted: "
                    f"one sample of each unit, and what it samples. {regular}",
                )
            ],
        )
    yield Section(
        "Where units look (Figure 6)",
        f"Units on the background, on the smallest and on the largest object of the first images "
        f"whose smallest object covers less than {SMALL:.0%} and whose largest more than "
        f"{LARGE:.0%} of them; where there are no such images, of those whose objects differ most "
        f"in size. Objects that hold no unit do not count.",
        [
            findings.picture(
                "sampling",
                sampling_figure(looks),
                f"What units sample through {len(network.layers)} layers "
                f"({', '.join(network.layers)}), in {names}. Faint points lie a cell or more "
                f"outside the map, where there is nothing to read. {regular}",
            )
        ],
    )
    yield _section_of_heats(findings, network, twin, scenes[0])


def _same_places(
    network: Network, twin: Network, image: Tensor, units: Sequence[Unit]
) -> list[Unit]:
    """The units of the twin at the places of a network's: it may see images at another size."""
    own, other = network.grid(image), twin.grid(image)
    return [
        dataclasses.replace(
            unit,
            row=int(abs(other.rows - own.rows[unit.row]).argmin()),
            column=int(abs(other.columns - own.columns[unit.column]).argmin()),
        )
        for unit in units
    ]


def _section_of_heats(
    findings: Findings, network: Network, twin: Network | None, scene: Scene
) -> Section:
    source = findings.source
    image = source[scene.index][0]
    other = network.at_rest() if twin is None else twin
    units = scene.units if twin is None else _same_places(network, twin, image, scene.units)
    heats = {other.name: other.heats(image, units), "deformable": network.heats(image, scene.units)}
    findings.numbers["effective_receptive_fields"] = {
        name: [
            {
                "image": source.name(scene.index),
                "unit": heat.what,
                "side": heat.field.side,
                "share_inside": heat.field.share_inside,
            }
            for heat in some
        ]
        for name, some in heats.items()
    }
    beside = (
        "beside the same weights with all offsets at zero (a network that was trained without "
        "them would look elsewhere)"
        if twin is None
        else "beside its plain twin"
    )
    return Section(
        "Effective receptive fields",
        f"Where the gradient of a unit lies in the image, the brighter the more, {beside}. The "
        f"square around the unit holds 95 % of it.",
        [
            findings.picture(
                "receptive-fields",
                receptive_field_figure(heats),
                f"Units of {network.layers[0]} in {source.name(scene.index)}.",
            ),
            Table(
                ("side of the square, pixels of the network's input", *heats),
                [
                    (ours.what, *(f"{some[k].field.side:.0f}" for some in heats.values()))
                    for k, ours in enumerate(heats["deformable"])
                ],
            ),
        ],
    )


def _section_of_dilation(findings: Findings, rows: Sequence[LayerDilation]) -> Section:
    source = findings.source
    things = (
        f"Objects are connected regions of {', '.join(source.objects)}; everything else is "
        f"background, void included"
        if isinstance(source.dataset, SegmentationDataset)
        else "Objects are all that have a box; everything else is background"
    )
    return Section(
        "Effective dilation (Table 2)",
        f"The mean distance between neighbouring samples of a filter, in cells of its input: mean "
        f"and standard deviation over filters (how many), by what they are centred on. Objects "
        f"whose box has less than 96² pixels of the original image are small, those of more than "
        f"224² large; a dash means that there is no filter on any. {things}.",
        [
            Table(
                ("layer", "small", "medium", "large", "background"),
                [
                    (
                        row.layer,
                        *map(dilation_cell, (row.small, row.medium, row.large, row.background)),
                    )
                    for row in rows
                ],
            ),
            findings.picture(
                "dilation",
                dilation_figure(rows),
                "The same: mean and standard deviation for each layer and size of object.",
            ),
        ],
    )


def _section_of_health(health: Sequence[LayerHealth]) -> Section:
    return Section(
        "Offsets",
        "How far samples are moved over all these images, in cells of the layer's input, and which "
        "share of them lies outside the map, where they read nothing.",
        [
            Table(
                ("layer", "mean shift", "largest", "outside", "outside at rest", "sign of trouble"),
                [
                    (
                        layer.layer,
                        f"{layer.mean_shift:.2f}",
                        f"{layer.largest_shift:.1f}",
                        f"{layer.outside:.1%}",
                        f"{layer.outside_at_rest:.1%}",
                        layer.runaway() or "none",
                    )
                    for layer in health
                ],
            )
        ],
    )


def _section_of_sheet(findings: Findings, network: Network) -> Section:
    source = findings.source
    # Neighbours in a list are often frames of one film.
    count = min(_SHEET, len(source))
    chosen = [number * len(source) // count for number in range(count)]
    sheet = {}
    for index in tqdm(chosen, desc="contact sheet", disable=None):
        image, contents = source[index]
        # The only object of an image is its smallest and its largest.
        units = {(it.row, it.column): it for it in units_of(contents, network.grid(image))}
        sheet[source.name(index)] = network.looks(image, list(units.values()), kinds=True)
    return Section(
        "Contact sheet",
        "",
        [
            findings.picture(
                "contact-sheet",
                contact_sheet_figure(sheet),
                f"{count} images at equal distances in the list, each with the lowest samples of a "
                f"unit on the background, on the smallest and on the largest object.",
            )
        ],
    )


def section_of_parts(findings: Findings, predictor: Predictor) -> Section:
    """Figure 7, of a detector with deformable pooling."""
    assert isinstance(predictor, DetectionPredictor)
    dataset = findings.source.dataset
    assert isinstance(dataset, DetectionDataset)
    looking = (
        dataset[index] for index in tqdm(range(len(findings.source)), desc="parts", disable=None)
    )
    parts = find_parts(predictor, looking, _PARTS)
    findings.numbers["parts"] = [
        {
            "what": it.what,
            **{name: getattr(it, name).tolist() for name in ("box", "plain", "moved")},
        }
        for it in parts
    ]
    title = "Where bins move (Figure 7)"
    if not parts:
        return Section(title, "Nothing was detected in these images.", [])
    return Section(
        title,
        "Deformable pooling divides each box into bins and moves them by its offsets, those of the "
        "detection's own class where classes have their own. Shown is the best detection of each "
        "of the first images in which it is right (IoU above 0.5 with an object of its class), "
        "or of others if there are too few.",
        [
            findings.picture(
                "parts",
                bins_figure(parts),
                "Detections with class and score: box, regular bins, moved bins.",
            )
        ],
    )


def section_of_cost(findings: Findings, network: Network, twin: Network | None) -> Section:
    """Parameters, arithmetic and time of the network, of its twin, and layer by layer."""
    image = findings.source[0][0]
    costs: dict[str, ModelCost] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for it in (network, *([] if twin is None else [twin])):
        prepared = it.predictor.prepare(image)
        inputs = [prepared.input]
        if isinstance(it.predictor, DetectionPredictor):
            inputs.append([prepared.size])  # pyright: ignore[reportArgumentType]
        costs[it.name], sizes[it.name] = model_cost(it.model, *inputs, repeats=3), prepared.size
    findings.numbers["cost"] = {
        name: {"input": list(sizes[name]), **asdict(cost)} for name, cost in costs.items()
    }
    layers = costs["deformable"].layers
    deformable = [layer for layer in layers if layer.kind.startswith("Deform")]
    height, width = sizes["deformable"]
    header = ("", "parameters", "GFLOPs", "ms")
    return Section(
        "Cost",
        f"One image of {height}x{width} pixels, batch 1, on {machine()}. A multiply-add is two "
        f"operations. Times are medians of few repeats and move with what else the machine does.",
        [
            Table(
                header,
                [
                    *(_cost_row(f"{name} network", cost) for name, cost in costs.items()),
                    *(_cost_row(layer.layer, layer) for layer in deformable),
                ],
            ),
            Table(
                ("layer", "kind", "output", *header[1:]),
                [
                    (
                        layer.layer,
                        layer.kind,
                        "-" if layer.output is None else "x".join(map(str, layer.output)),
                        *_cost_row(layer.layer, layer)[1:],
                    )
                    for layer in layers
                ],
                folded=True,
            ),
        ],
    )


def _cost_row(name: str, cost: Any) -> tuple[str, str, str, str]:
    return name, f"{cost.parameters:,}", f"{cost.flops / 1e9:.2f}", f"{1000 * cost.seconds:.1f}"
