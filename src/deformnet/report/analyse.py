"""Looks at a trained run over a data set and puts what it shows on a page.

```
OUT/
  index.html        the page
  analysis.json     the numbers
  *.png, *.svg      the pictures
```
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from deformnet.analysis import (
    AnnotatedImage,
    LayerDilation,
    LayerHealth,
    ModelCost,
    OffsetObserver,
    dilation_statistics,
    effective_receptive_field,
    model_cost,
    record_sampling,
)
from deformnet.data import DetectionDataset, open_detection, open_segmentation
from deformnet.data.base import SegmentationDataset
from deformnet.figures import (
    Heat,
    Look,
    contact_sheet,
    dilation_cell,
    dilation_figure,
    fields_figure,
    parts_figure,
    receptive_fields_figure,
    sampling_figure,
    save,
)
from deformnet.inference import DetectionPredictor, SegmentationPredictor, open_predictor
from deformnet.models.deeplab import DeepLab
from deformnet.models.detector import Detector
from deformnet.nn import DeformConv2d
from deformnet.report.contents import Contents, object_classes, of_boxes, of_label_map
from deformnet.report.page import Picture, Section, Table, write_page
from deformnet.report.parts import find_parts, pooling_layer
from deformnet.report.scenes import (
    LARGE,
    SMALL,
    Grid,
    Scene,
    Unit,
    choose_scenes,
    look,
    units_of,
)
from deformnet.runs import machine, versions, write_json

_DEPTH = 3  # layers whose samples are followed, as in Figure 6
_SCENES, _PARTS, _SHEET = 2, 6, 24  # images in the pictures

Predictor = SegmentationPredictor | DetectionPredictor


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
    network = _Network("deformable", predictor)
    if not network.deforms and network.pooling is None:
        raise ValueError(f"{run}: has no deformable layers, there is nothing to see")
    twin = None if plain is None else _open_twin(plain, run, predictor, device)
    source = _Source(predictor, run, data, split, images, objects)
    report = _Report(run, plain, data, split, source, out)
    for section in (
        *(_sections_of_filters(report, network, twin, source) if network.deforms else ()),
        *([_section_of_parts(report, predictor, source)] if network.pooling else ()),
        _section_of_cost(report, network, twin, source),
    ):
        report.sections.append(section)
    return report.write()


class _Network:
    """A network by name, and how to look into it."""

    def __init__(
        self, name: str, predictor: Predictor, model: DeepLab | Detector | None = None
    ) -> None:
        self.name = name
        self.predictor = predictor
        self.model = model or predictor.model
        chain = predictor.model.backbone.filter_chain()[:_DEPTH]
        self.layers = tuple(f"backbone.{layer}" for layer in chain)
        self.deforms = any(isinstance(m, DeformConv2d) for m in self.model.modules())
        self.pooling = pooling_layer(self.model)

    def grid(self, image: Tensor) -> Grid:
        return Grid.over(self.predictor.prepare(image), self.model.backbone.stride)

    def looks(
        self, image: Tensor, units: Sequence[Unit], *, at_rest: bool = False, kinds: bool = False
    ) -> list[Look]:
        """What units sample; `kinds` names them by their kind alone."""
        prepared = self.predictor.prepare(image)
        stack = record_sampling(self.model, prepared.input, self.layers, call=self.model.backbone)
        return [
            look(image, prepared, stack, it, what=it.kind if kinds else None, at_rest=at_rest)
            for it in units
        ]

    def heats(self, image: Tensor, units: Sequence[Unit]) -> list[Heat]:
        """The effective receptive fields of units, over the image as the network sees it."""
        prepared = self.predictor.prepare(image)
        small = F.resize(image, list(prepared.size), antialias=True)
        stack = record_sampling(
            self.model, prepared.input, self.layers[:1], call=self.model.backbone
        )
        heats = []
        for unit in tqdm(units, desc=f"receptive fields, {self.name}", disable=None):
            place = (unit.row, unit.column)
            field = effective_receptive_field(
                self.model, prepared.input, self.layers[0], place, call=self.model.backbone
            )
            heats.append(Heat(small, unit.what, stack.centre(place), field))
        return heats

    def at_rest(self) -> "_Network":
        """The same with all offsets of its convolutions zero."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, DeformConv2d):
                for numbers in module.conv_offset.parameters():
                    nn.init.zeros_(numbers)
        return _Network("offsets at zero", self.predictor, model)


class _Source:
    """The images of a split, with what is in them."""

    def __init__(
        self,
        predictor: Predictor,
        run: Path,
        data: Path,
        split: str,
        limit: int | None,
        objects: Sequence[str],
    ) -> None:
        self.dataset: SegmentationDataset | DetectionDataset
        if isinstance(predictor, SegmentationPredictor):
            self.dataset = open_segmentation(data, split)
        else:
            self.dataset = open_detection(data, split)
            if not self.dataset.has_truth:
                raise ValueError(f"{data}: the objects of {split} are not published")
        if self.dataset.classes != predictor.classes:
            raise ValueError(
                f"{data}: has the classes {', '.join(self.dataset.classes)}; "
                f"{run} was trained on {', '.join(predictor.classes)}"
            )
        unknown = [name for name in objects if name not in self.dataset.classes]
        if unknown:
            known = ", ".join(self.dataset.classes)
            raise ValueError(f"objects: wanted some of {known}, got {unknown[0]!r}")
        labelled = isinstance(self.dataset, SegmentationDataset)
        chosen = object_classes(self.dataset.classes) if labelled else self.dataset.classes
        self.objects = tuple(objects) or chosen
        if not self.objects:
            raise ValueError(f"{data}: no class is one of single things; name some by objects")
        self._count = len(self.dataset) if limit is None else min(limit, len(self.dataset))

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def __getitem__(self, index: int) -> tuple[Tensor, Contents]:
        image, truth = self.dataset[index]
        image = image.as_subclass(Tensor)
        if isinstance(truth, Tensor):
            labels = truth.as_subclass(Tensor)
            return image, of_label_map(labels, self.dataset.classes, self.objects)
        size = (image.shape[1], image.shape[2])
        return image, of_boxes(truth, self.dataset.classes, size)

    def contents(self, what: str) -> Iterator[tuple[Tensor, Contents]]:
        """All images in turn, with a progress bar."""
        for index in tqdm(range(len(self)), desc=what, disable=None):
            yield self[index]


@dataclass
class _Report:
    """What is written in the end."""

    run: Path
    plain: Path | None
    data: Path
    split: str
    source: _Source
    out: Path
    sections: list[Section] = dataclasses.field(default_factory=list)
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def picture(self, name: str, figure: Figure, caption: str) -> Picture:
        """Writes a picture."""
        for suffix in (".png", ".svg"):
            save(figure, self.out / f"{name}{suffix}")
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


def _open(run: Path, device: torch.device | str | None) -> Predictor:
    predictor = open_predictor(run, device=device)
    if not isinstance(predictor, Predictor):
        raise ValueError(f"{run}: wanted a run of deeplab or of a detector, got a classifier's")
    return predictor


def _open_twin(
    plain: Path, run: Path, predictor: Predictor, device: torch.device | str | None
) -> _Network:
    twin = _open(plain, device)
    network = _Network("plain", twin)
    if network.deforms:
        raise ValueError(f"{plain}: wanted a plain network, it has deformable convolutions")
    if type(twin.model) is not type(predictor.model) or twin.classes != predictor.classes:
        raise ValueError(f"{plain}: wanted the same kind of network and classes as {run}")
    return network


def _sections_of_filters(
    report: _Report, network: _Network, twin: _Network | None, source: _Source
) -> Iterator[Section]:
    """All that needs deformable convolutions."""
    rows, health = _statistics(network, source)
    report.numbers["effective_dilation"] = [asdict(row) for row in rows]
    report.numbers["offset_health"] = [asdict(layer) for layer in health]
    scenes = _find_scenes(network, source)
    report.numbers["scenes"] = [
        {"image": source.name(scene.index), "units": [asdict(unit) for unit in scene.units]}
        for scene in scenes
    ]
    if scenes:
        yield from _sections_of_scenes(report, network, twin, source, scenes)
    yield _section_of_dilation(report, rows)
    yield _section_of_health(health)
    yield _section_of_sheet(report, network, source)


def _statistics(
    network: _Network, source: _Source
) -> tuple[list[LayerDilation], list[LayerHealth]]:
    """Effective dilation and shifts over all images."""

    def annotated() -> Iterator[AnnotatedImage]:
        for image, contents in source.contents("effective dilation"):
            prepared = network.predictor.prepare(image)
            scale = math.sqrt(math.prod(prepared.scale))
            yield AnnotatedImage(prepared.input[0], contents.boxes(), scale)

    with OffsetObserver(network.model) as observer:
        rows = dilation_statistics(network.model, annotated(), call=network.model.backbone)
    return rows, observer.health()


def _find_scenes(network: _Network, source: _Source) -> list[Scene]:
    found = (
        (contents, network.grid(image)) for image, contents in source.contents("units to look at")
    )
    return choose_scenes(found, _SCENES)


def _sections_of_scenes(
    report: _Report,
    network: _Network,
    twin: _Network | None,
    source: _Source,
    scenes: Sequence[Scene],
) -> Iterator[Section]:
    """Figures 5 and 6, and effective receptive fields."""
    looks: dict[str, list[Look]] = {"plain": [], "deformable": []}
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
        pair = {name: some[1:3] for name, some in looks.items()}
        yield Section(
            "Receptive fields in two layers (Figure 5)",
            "A unit at the top samples the map below at nine points, and each of these the next "
            "map at nine. Without offsets the pattern is the same on every object; offsets fit it "
            "to scale and shape.",
            [
                report.picture(
                    "fields",
                    fields_figure(pair),
                    f"A unit on a small and one on a large object of {source.name(scenes[0].index)}"
                    f"; from top to bottom the units, their samples in the map below, and the "
                    f"samples of these in the next. Highlighted: one sample of each unit, and what "
                    f"it samples. {regular}",
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
            report.picture(
                "sampling",
                sampling_figure(looks),
                f"What three units sample through {len(network.layers)} layers "
                f"({', '.join(network.layers)}), in {names}. Faint points lie outside the map, "
                f"where there is nothing to read. {regular}",
            )
        ],
    )
    yield _section_of_heats(report, network, twin, source, scenes[0])


def _same_places(
    network: _Network, twin: _Network, image: Tensor, units: Sequence[Unit]
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
    report: _Report, network: _Network, twin: _Network | None, source: _Source, scene: Scene
) -> Section:
    image = source[scene.index][0]
    other = network.at_rest() if twin is None else twin
    units = scene.units if twin is None else _same_places(network, twin, image, scene.units)
    heats = {other.name: other.heats(image, units), "deformable": network.heats(image, scene.units)}
    report.numbers["effective_receptive_fields"] = {
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
            report.picture(
                "receptive-fields",
                receptive_fields_figure(heats),
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


def _section_of_dilation(report: _Report, rows: Sequence[LayerDilation]) -> Section:
    source = report.source
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
        f"224² large. {things}.",
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
            report.picture(
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


def _section_of_sheet(report: _Report, network: _Network, source: _Source) -> Section:
    sheet = {}
    count = min(_SHEET, len(source))
    for index in tqdm(range(count), desc="contact sheet", disable=None):
        image, contents = source[index]
        # The only object of an image is its smallest and its largest.
        units = {(it.row, it.column): it for it in units_of(contents, network.grid(image))}
        sheet[source.name(index)] = network.looks(image, list(units.values()), kinds=True)
    return Section(
        "Contact sheet",
        "",
        [
            report.picture(
                "contact-sheet",
                contact_sheet(sheet),
                f"The first {count} images, each with the lowest samples of a unit on the "
                f"background, on the smallest and on the largest object.",
            )
        ],
    )


def _section_of_parts(report: _Report, predictor: Predictor, source: _Source) -> Section:
    assert isinstance(predictor, DetectionPredictor)
    assert isinstance(source.dataset, DetectionDataset)
    dataset = source.dataset
    looking = (dataset[index] for index in tqdm(range(len(source)), desc="parts", disable=None))
    parts = find_parts(predictor, looking, _PARTS)
    report.numbers["parts"] = [
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
            report.picture(
                "parts",
                parts_figure(parts),
                "Detections with class and score: box, regular bins, moved bins.",
            )
        ],
    )


def _section_of_cost(
    report: _Report, network: _Network, twin: _Network | None, source: _Source
) -> Section:
    image = source[0][0]
    costs: dict[str, ModelCost] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for it in (network, *([] if twin is None else [twin])):
        prepared = it.predictor.prepare(image)
        inputs = [prepared.input]
        if isinstance(it.predictor, DetectionPredictor):
            inputs.append([prepared.size])  # pyright: ignore[reportArgumentType]
        costs[it.name], sizes[it.name] = model_cost(it.model, *inputs, repeats=3), prepared.size
    report.numbers["cost"] = {
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
