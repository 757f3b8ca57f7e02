"""Sections of a report: each measures a part of the network and describes it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor
from tqdm import tqdm

from deformnet import analysis, visualization
from deformnet._text import Table
from deformnet.engine.runs import machine
from deformnet.inspection.report.bins import find_bins
from deformnet.inspection.report.findings import Findings, Section
from deformnet.inspection.report.images import AnalyzedImages
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.scenes import LARGE, SMALL, Scene, Unit, choose_scenes, units_of
from deformnet.inspection.runs import OpenedRun
from deformnet.tasks.base import Processes

_SCENES, _DETECTIONS, _SHEET = 2, 6, 24  # images in the figures
_UNFOLDED = 25  # rows of a table of scores
_Sampled = Mapping[str, Sequence[visualization.SampledUnit]]


def convolution_sections(
    findings: Findings, network: UnitRecorder, baseline: UnitRecorder | None
) -> Iterator[Section]:
    """Yield the sections on deformable convolutions."""
    images = findings.images
    rows, health = _statistics(network, images)
    findings.numbers["effective_dilation"] = [asdict(row) for row in rows]
    findings.numbers["offset_health"] = [asdict(layer) for layer in health]
    scenes = choose_scenes(
        ((contents, network.grid(image)) for image, contents in images.contents("scenes")), _SCENES
    )
    findings.numbers["scenes"] = [
        {"image": images.name(scene.index), "units": [asdict(unit) for unit in scene.units]}
        for scene in scenes
    ]
    if scenes:
        sampled = _sample(images, network, baseline, scenes)
        if len(network.layers) > 1:
            yield _two_layer_section(findings, scenes, sampled, baseline)
        yield _sampling_section(findings, network, scenes, sampled, baseline)
        yield _receptive_field_section(findings, network, baseline, scenes[0])
    yield _dilation_section(findings, rows)
    yield _offset_section(health)
    yield _contact_sheet_section(findings, network)


def _statistics(
    network: UnitRecorder, images: AnalyzedImages
) -> tuple[list[analysis.LayerDilation], list[analysis.LayerHealth]]:
    """Compute effective dilation and shifts over all images."""

    def annotated() -> Iterator[analysis.AnnotatedImage]:
        for image, contents in images.contents("effective dilation"):
            prepared = network.run.predictor.prepare(image)
            scale = math.sqrt(math.prod(prepared.scale))
            yield analysis.AnnotatedImage(prepared.input[0], contents.boxes(), scale)

    with analysis.OffsetObserver(network.model) as observer:
        rows = analysis.dilation_statistics(network.model, annotated(), call=network.model.backbone)
    return rows, observer.health()


def _sample(
    images: AnalyzedImages,
    network: UnitRecorder,
    baseline: UnitRecorder | None,
    scenes: Sequence[Scene],
) -> _Sampled:
    """Record the units of scenes in the network, and without offsets."""
    regular: list[visualization.SampledUnit] = []
    deformable: list[visualization.SampledUnit] = []
    for scene in scenes:
        image = images[scene.index][0]
        deformable += network.samples(image, scene.units)
        if baseline is None:
            regular += network.samples(image, scene.units, zero_offsets=True)
        else:
            regular += baseline.samples(image, _same_places(network, baseline, image, scene.units))
    return {"regular" if baseline is None else "baseline": regular, "deformable": deformable}


def _same_places(
    network: UnitRecorder, baseline: UnitRecorder, image: Tensor, units: Sequence[Unit]
) -> list[Unit]:
    """Return the units of the baseline at the same places; it may see images at another size."""
    own, other = network.grid(image), baseline.grid(image)
    return [
        dataclasses.replace(
            unit,
            row=int(abs(other.rows - own.rows[unit.row]).argmin()),
            column=int(abs(other.columns - own.columns[unit.column]).argmin()),
        )
        for unit in units
    ]


def _compared(baseline: UnitRecorder | None) -> str:
    if baseline is None:
        return "Regular: the same filters without their offsets."
    return "Baseline: the network without deformable layers."


def _two_layer_section(
    findings: Findings, scenes: Sequence[Scene], sampled: _Sampled, baseline: UnitRecorder | None
) -> Section:
    # Two of the three units of each scene are on objects; those farthest apart are seen best.
    own = sampled["deformable"]
    best = max(
        range(len(scenes)),
        key=lambda k: math.dist(own[3 * k + 1].center, own[3 * k + 2].center),
    )
    pair = {name: units[3 * best + 1 : 3 * best + 3] for name, units in sampled.items()}
    caption = (
        f"A unit on a small and one on a large object of "
        f"{findings.images.name(scenes[best].index)}; from top to bottom: the units, their samples "
        f"one layer below, and the samples of these two layers below. Highlighted: one sample of "
        f"each unit, and its own samples. {_compared(baseline)}"
    )
    return Section(
        "Receptive fields in two layers (Figure 5)",
        "A unit at the top samples the map below at nine points, and each of these samples the "
        "next map at nine points. Without offsets the pattern is the same on every object; offsets "
        "adapt it to scale and shape.",
        (findings.picture("fields", visualization.two_layer_figure(pair), caption),),
    )


def _sampling_section(
    findings: Findings,
    network: UnitRecorder,
    scenes: Sequence[Scene],
    sampled: _Sampled,
    baseline: UnitRecorder | None,
) -> Section:
    names = " and ".join(findings.images.name(scene.index) for scene in scenes)
    caption = (
        f"Sampling locations through {len(network.layers)} layers ({', '.join(network.layers)}) in "
        f"{names}. Faint points are a pixel or more outside the map, where there is nothing to "
        f"read. {_compared(baseline)}"
    )
    return Section(
        "Sampling locations (Figure 6)",
        f"Units on the background, on the smallest and on the largest object of the first images "
        f"whose smallest object covers less than {SMALL:.0%} and whose largest covers more than "
        f"{LARGE:.0%} of the image; if there are too few such images, of those whose objects "
        f"differ most in size. Objects without a unit inside do not count.",
        (findings.picture("sampling", visualization.sampling_figure(sampled), caption),),
    )


def _receptive_field_section(
    findings: Findings, network: UnitRecorder, baseline: UnitRecorder | None, scene: Scene
) -> Section:
    name, (image, _) = findings.images.name(scene.index), findings.images[scene.index]
    if baseline is None:
        other, units = network.without_offsets(), scene.units
        compared = (
            "compared to the same weights with all offsets at zero (training without offsets would "
            "have given other weights)"
        )
    else:
        other, units = baseline, _same_places(network, baseline, image, scene.units)
        compared = "compared to the baseline"
    maps = {
        other.name: other.receptive_fields(image, units),
        network.name: network.receptive_fields(image, scene.units),
    }
    findings.numbers["effective_receptive_fields"] = {
        network: [
            {
                "image": name,
                "unit": it.title,
                "side": it.field.side,
                "fraction_inside": it.field.fraction_inside,
            }
            for it in of_network
        ]
        for network, of_network in maps.items()
    }
    caption = f"Units of {network.layers[0]} in {name}."
    figure = visualization.receptive_field_figure(maps)
    sides = [
        (units[0].title, *(f"{it.field.side:.0f}" for it in units))
        for units in zip(*maps.values(), strict=True)
    ]
    return Section(
        "Effective receptive fields",
        f"The gradient of a unit with respect to the image; brighter is larger; {compared}. The "
        f"square around the unit contains 95 % of it.",
        (
            findings.picture("receptive-fields", figure, caption),
            Table("", ("side of the square, pixels of the network's input", *maps), sides),
        ),
    )


def _dilation_section(findings: Findings, rows: Sequence[analysis.LayerDilation]) -> Section:
    images = findings.images
    objects = images.annotated.objects_are.format(classes=", ".join(images.objects))
    caption = "Mean and standard deviation of the effective dilation by layer and object size."
    return Section(
        "Effective dilation (Table 2)",
        f"Mean distance between adjacent samples of a filter, in pixels of its input: mean and "
        f"standard deviation over filters (number of filters), by what is at their center. The "
        f"bounding box of a small object has less than 96² pixels of the original image, that of a "
        f"large one more than 224²; a dash means no filters. {objects}; everything else is "
        f"background, void included.",
        (
            Table(
                "",
                ("layer", "small", "medium", "large", "background"),
                [(it.layer, *map(visualization.dilation_cell, it.by_size)) for it in rows],
            ),
            findings.picture("dilation", visualization.dilation_figure(rows), caption),
        ),
    )


def _offset_section(health: Sequence[analysis.LayerHealth]) -> Section:
    return Section(
        "Offsets",
        "Shifts of samples over all these images, in pixels of the layer's input, and the fraction "
        "of samples outside the map, where there is nothing to read.",
        (
            Table(
                "",
                ("layer", "mean shift", "largest", "outside", "outside without offsets", "warning"),
                [
                    (
                        layer.layer,
                        f"{layer.mean_shift:.2f}",
                        f"{layer.max_shift:.1f}",
                        f"{layer.outside:.1%}",
                        f"{layer.outside_without_offsets:.1%}",
                        layer.runaway() or "none",
                    )
                    for layer in health
                ],
            ),
        ),
    )


def _contact_sheet_section(findings: Findings, network: UnitRecorder) -> Section:
    images = findings.images
    # Neighbors in a list are often frames of one video.
    count = min(_SHEET, len(images))
    chosen = [number * len(images) // count for number in range(count)]
    sheet = {}
    for index in tqdm(chosen, desc="contact sheet", disable=None):
        image, contents = images[index]
        # The only object of an image is both its smallest and its largest.
        units = {(it.row, it.column): it for it in units_of(contents, network.grid(image))}
        sheet[images.name(index)] = network.samples(image, list(units.values()), kinds=True)
    caption = (
        f"{count} images at equal intervals, each with the samples in the lowest layer of units on "
        f"the background, on the smallest and on the largest object."
    )
    picture = findings.picture("contact-sheet", visualization.contact_sheet_figure(sheet), caption)
    return Section("Contact sheet", "", (picture,))


def bins_section(findings: Findings, run: OpenedRun) -> Section:
    """Return the section on deformable RoI pooling."""
    images = findings.images
    detections = find_bins(
        run.predictor,
        (images.annotated[k] for k in tqdm(range(len(images)), desc="bins", disable=None)),
        _DETECTIONS,
    )
    findings.numbers["parts"] = [
        {
            "what": it.title,
            "box": it.box.tolist(),
            "plain": it.regular.tolist(),
            "moved": it.moved.tolist(),
        }
        for it in detections
    ]
    title = "Moved bins (Figure 7)"
    if not detections:
        return Section(title, "Nothing was detected in these images.", ())
    caption = "Detections with class and score: box, regular bins, moved bins."
    return Section(
        title,
        "Deformable RoI pooling divides each box into bins and moves them by offsets, which belong "
        "to the class of the detection if offsets are class-aware. Shown is the best detection of "
        "each of the first images in which it is correct (IoU above 0.5 with an object of its "
        "class); if there are too few, of other images.",
        (findings.picture("parts", visualization.bins_figure(detections), caption),),
    )


def scores_section(findings: Findings, run: OpenedRun) -> Section:
    """Return the section on the scores of the run on all images."""
    images = run.task.evaluation_set(findings.data, findings.analysis.split, run.data)
    processes = Processes(device=run.predictor.device, progress=True)
    scores = images.evaluate(run.model, processes)
    findings.numbers["scores"] = scores.json
    pictures = (
        findings.picture(name, draw(), f"{name.replace('-', ' ').capitalize()}.")
        for name, draw in scores.pictures.items()
    )
    # Tables with a title are folded.
    tables = (
        table if len(table.rows) > _UNFOLDED else table._replace(title="")
        for table in (scores.table, *scores.details)
    )
    return Section("Scores", f"{scores.table.title}, percent.", (*tables, *pictures))


def cost_section(findings: Findings, run: OpenedRun, baseline: OpenedRun | None) -> Section:
    """Return the section on parameters, FLOPs and time, of whole networks and layer by layer."""
    image = findings.images[0][0]
    costs: dict[str, analysis.ModelCost] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, it in (("deformable", run), ("baseline", baseline)):
        if it is not None:
            prepared = it.predictor.prepare(image)
            arguments = it.predictor.arguments(prepared)
            costs[name] = analysis.model_cost(it.model, *arguments, repeats=3)
            sizes[name] = prepared.size
    findings.numbers["cost"] = {
        name: {"input": list(sizes[name]), **asdict(cost)} for name, cost in costs.items()
    }
    layers = costs["deformable"].layers
    deformable = [layer for layer in layers if layer.kind.startswith("Deform")]
    height, width = sizes["deformable"]
    header = ("parameters", "GFLOPs", "ms")
    return Section(
        "Cost",
        f"One image of {height}x{width} pixels, batch size 1, on {machine()}. A multiply-add "
        f"counts as two operations. Times are medians of few runs and vary with other load.",
        (
            Table(
                "",
                ("", *header),
                [
                    *((f"{name} network", *_cost_cells(cost)) for name, cost in costs.items()),
                    *((layer.layer, *_cost_cells(layer)) for layer in deformable),
                ],
            ),
            Table(
                f"{len(layers)} layers",
                ("layer", "kind", "output", *header),
                [
                    (layer.layer, layer.kind, _shape(layer.output), *_cost_cells(layer))
                    for layer in layers
                ],
            ),
        ),
    )


def _cost_cells(cost: analysis.ModelCost | analysis.LayerCost) -> tuple[str, str, str]:
    return f"{cost.parameters:,}", f"{cost.flops / 1e9:.2f}", f"{1000 * cost.seconds:.1f}"


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape))
