"""Every row of Tables 1, 3, 5 and 7 of Dai et al. 2017: network, data, schedule, published number.

Rows that differ in testing alone, or that stand in two tables, share a training run.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deformnet.recipes import (
    ONE_LOOK,
    BackboneName,
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    DeformLayers,
    DetectionTesting,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    RPNRecipe,
    cityscapes,
    coco_detection,
    imagenet,
    voc2012,
    voc_detection,
)

ScoreAt = Literal["truth", "network"]


@dataclass(frozen=True)
class DataSet:
    """Data that a row is trained and tested on.

    Attributes:
        key: short name, in the names of runs.
        title: what it is.
        classes: how many the network tells apart; DeepLab's background is one.
        train, test: the splits, as `deformnet train` takes them.
    """

    key: Literal["voc-seg", "cityscapes", "voc", "coco", "imagenet"]
    title: str
    classes: int
    train: str
    test: str


VOC_SEGMENTATION = DataSet("voc-seg", "PASCAL VOC 2012 with SBD's masks", 21, "train_aug", "val")
CITYSCAPES = DataSet("cityscapes", "Cityscapes (fine)", 19, "train", "val")
VOC_DETECTION = DataSet(
    "voc", "PASCAL VOC 2007 + 2012", 20, "VOC2007/trainval+VOC2012/trainval", "VOC2007/test"
)
# The same images as the lists of 2014 and 2015, which the server no longer takes results for.
COCO = DataSet("coco", "COCO", 80, "train2017+val2017", "test-dev2017")
IMAGENET = DataSet("imagenet", "ImageNet-1K", 1000, "train", "val")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, as a recipe with its data and its published numbers.

    Attributes:
        name: table and row, such as `table1/rfcn-3`.
        recipe: network and schedule; None for a network that is not built here.
        data: what it is trained and tested on.
        paper: the published numbers in percent, by metric.
        testing: of detectors.
        score_at: of DeepLab; see `deformnet.engine.evaluate`.
        fixed_proposals: whether it is trained on the proposals of an RPN that was trained apart.
        starts_from: the row whose run gives the backbone its weights, where no public ones exist.
        missing: why there is no recipe.
    """

    name: str
    recipe: Recipe | None
    data: DataSet
    paper: Mapping[str, float]
    testing: DetectionTesting = ONE_LOOK
    score_at: ScoreAt = "truth"
    fixed_proposals: bool = False
    starts_from: str | None = None
    missing: str | None = None

    @property
    def run(self) -> str:
        """Name of the training run, the same for rows that are trained alike."""
        assert self.recipe is not None
        parts = [self.data.key, self.recipe.network]
        if self.recipe.backbone != "resnet101" or self.data is IMAGENET:
            parts.append(self.recipe.backbone)
        if not isinstance(self.recipe, ClassifierRecipe):
            parts.append(f"conv{self.recipe.deform_layers}")
        if getattr(self.recipe, "dilation", 2) != 2:
            parts.append(f"dilation{getattr(self.recipe, 'dilation')}")  # noqa: B009
        if isinstance(self.recipe, (FasterRCNNRecipe, RFCNRecipe)):
            parts.append(f"{self.recipe.pool}-pool")
        return "-".join(parts)


_MEAN_IOU = "mean IoU"
_VOC_AP = ("mAP@0.5", "mAP@0.7")
_COCO_AP = ("AP", "AP50", "APsmall", "APmedium", "APlarge")
_ERRORS = ("top-1 error", "top-5 error")

# Tables 1 and 3: mean IoU on VOC and Cityscapes; then mAP at IoU 0.5 and 0.7 of class-aware RPN,
# Faster R-CNN and R-FCN. None where a row makes no sense for a network.
_Pair = tuple[float, float]
_TABLE1: dict[DeformLayers, tuple[_Pair, _Pair, _Pair, _Pair]] = {
    0: ((69.7, 70.4), (68.0, 44.9), (78.1, 62.1), (80.0, 61.8)),
    1: ((73.9, 73.5), (73.5, 54.4), (78.6, 63.8), (80.6, 63.0)),
    2: ((74.8, 74.4), (74.3, 56.3), (78.5, 63.3), (81.0, 63.8)),
    3: ((75.2, 75.2), (74.5, 57.2), (78.6, 63.3), (81.4, 64.7)),
    6: ((74.8, 75.1), (74.6, 57.7), (78.7, 64.0), (81.5, 65.4)),
}
_TABLE3_ATROUS: dict[int, tuple[_Pair, _Pair, _Pair, _Pair]] = {
    2: ((69.7, 70.4), (68.0, 44.9), (78.1, 62.1), (80.0, 61.8)),
    4: ((73.1, 71.9), (72.8, 53.1), (78.6, 63.1), (80.5, 63.0)),
    6: ((73.6, 72.7), (73.6, 55.2), (78.5, 62.3), (80.2, 63.5)),
    8: ((73.2, 72.4), (73.2, 55.1), (77.8, 61.8), (80.3, 63.2)),
}
# The paper disagrees with itself: three layers give DeepLab 75.2 on VOC in Table 1.
_TABLE3_CONV: tuple[_Pair, _Pair, _Pair, _Pair] = (
    (75.3, 75.2),
    (74.5, 57.2),
    (78.6, 63.3),
    (81.4, 64.7),
)
_TABLE3_POOL: tuple[_Pair, _Pair] = ((78.3, 66.6), (81.2, 65.0))
_TABLE3_BOTH: tuple[_Pair, _Pair] = ((79.3, 66.9), (82.6, 68.5))

_Five = tuple[float, float, float, float, float]
_TABLE5: dict[str, tuple[_Five, _Five]] = {
    "class-aware-rpn": ((23.2, 42.6, 6.9, 27.1, 35.1), (25.8, 45.9, 7.2, 28.3, 40.7)),
    "faster-rcnn": ((29.4, 48.0, 9.0, 30.5, 47.1), (33.1, 50.3, 11.6, 34.9, 51.2)),
    "rfcn": ((30.8, 52.6, 11.8, 33.9, 44.8), (34.5, 55.0, 14.0, 37.7, 50.3)),
    "faster-rcnn-aligned": ((30.8, 49.6, 9.6, 32.5, 49.0), (34.1, 51.1, 12.2, 36.5, 52.4)),
    "rfcn-aligned": ((32.9, 54.5, 12.5, 36.3, 48.3), (36.1, 56.7, 14.8, 39.8, 52.2)),
    "rfcn-aligned-m": ((34.5, 55.0, 16.8, 37.3, 48.3), (37.1, 57.3, 18.8, 39.7, 52.3)),
    "rfcn-aligned-m-b": ((35.5, 55.6, 17.8, 38.4, 49.3), (37.5, 58.0, 19.4, 40.1, 52.5)),
}
_SCALES = (480, 576, 688, 864, 1200, 1400)
_MULTI_SCALE = DetectionTesting(scales=_SCALES)
_AND_AVERAGING = DetectionTesting(scales=_SCALES, refine=2, box_averaging=True)

_ALIGNED_CLASSIFIER = "table7/aligned-inception-resnet"


def _in_all_networks(
    table: str,
    variant: str,
    numbers: tuple[_Pair, _Pair, _Pair, _Pair],
    *,
    layers: DeformLayers,
    dilation: int = 2,
) -> Iterator[Row]:
    """A line of Table 1 or 3 for the networks that have no deformable pooling, and plain ones."""
    (voc, city), rpn, faster, rfcn = numbers
    yield Row(
        name=f"{table}/deeplab-voc-{variant}",
        recipe=dataclasses.replace(voc2012(deform_layers=layers), dilation=dilation),
        data=VOC_SEGMENTATION,
        paper={_MEAN_IOU: voc},
        score_at="network",
    )
    yield Row(
        name=f"{table}/deeplab-cityscapes-{variant}",
        recipe=dataclasses.replace(cityscapes(deform_layers=layers), dilation=dilation),
        data=CITYSCAPES,
        paper={_MEAN_IOU: city},
    )
    for recipe, numbers_of in (
        (voc_detection(ClassAwareRPNRecipe), rpn),
        (dataclasses.replace(voc_detection(FasterRCNNRecipe), pool="max"), faster),
        (dataclasses.replace(voc_detection(RFCNRecipe), pool="average"), rfcn),
    ):
        yield _voc_row(
            f"{table}/{recipe.network}-{variant}",
            dataclasses.replace(recipe, deform_layers=layers, dilation=dilation),
            numbers_of,
        )


def _voc_row(name: str, recipe: Recipe, numbers: _Pair) -> Row:
    return Row(
        name=name,
        recipe=recipe,
        data=VOC_DETECTION,
        paper=dict(zip(_VOC_AP, numbers, strict=True)),
        fixed_proposals=isinstance(recipe, (FasterRCNNRecipe, RFCNRecipe)),
    )


def _table1() -> Iterator[Row]:
    for layers, numbers in _TABLE1.items():
        yield from _in_all_networks("table1", str(layers), numbers, layers=layers)


def _table3() -> Iterator[Row]:
    for dilation, numbers in _TABLE3_ATROUS.items():
        yield from _in_all_networks(
            "table3", f"atrous-{dilation}", numbers, layers=0, dilation=dilation
        )
    yield from _in_all_networks("table3", "conv", _TABLE3_CONV, layers=3)
    for variant, layers, numbers in (("pool", 0, _TABLE3_POOL), ("conv-pool", 3, _TABLE3_BOTH)):
        for network, pair in zip((FasterRCNNRecipe, RFCNRecipe), numbers, strict=True):
            recipe = dataclasses.replace(
                voc_detection(network), deform_layers=layers, pool="deformable"
            )
            yield _voc_row(f"table3/{network.network}-{variant}", recipe, pair)


def _table5() -> Iterator[Row]:
    for name, numbers in _TABLE5.items():
        aligned = "-aligned" in name
        for kind, five in zip(("plain", "deformable"), numbers, strict=True):
            recipe = _coco_recipe(name, deformable=kind == "deformable")
            if aligned:
                recipe = dataclasses.replace(recipe, backbone="aligned-inception-resnet", init=None)
            base, _, testing = name.partition("-aligned")
            yield Row(
                name=f"table5/{base}{'-aligned' if aligned else ''}-{kind}{testing}",
                recipe=recipe,
                data=COCO,
                paper=dict(zip(_COCO_AP, five, strict=True)),
                testing={"": ONE_LOOK, "-m": _MULTI_SCALE, "-m-b": _AND_AVERAGING}[testing],
                starts_from=_ALIGNED_CLASSIFIER if aligned else None,
            )


def _coco_recipe(name: str, *, deformable: bool) -> Recipe:
    if name.startswith("class-aware-rpn"):
        return dataclasses.replace(
            coco_detection(ClassAwareRPNRecipe), deform_layers=3 if deformable else 0
        )
    if name.startswith("faster-rcnn"):
        return dataclasses.replace(
            coco_detection(FasterRCNNRecipe),
            deform_layers=3 if deformable else 0,
            pool="deformable" if deformable else "max",
        )
    return dataclasses.replace(
        coco_detection(RFCNRecipe),
        deform_layers=3 if deformable else 0,
        pool="deformable" if deformable else "average",
    )


_TABLE7: dict[BackboneName, _Pair] = {
    "resnet101": (23.6, 7.1),
    "aligned-inception-resnet": (22.1, 6.0),
}


def _table7() -> Iterator[Row]:
    for backbone, errors in _TABLE7.items():
        yield Row(
            name=f"table7/{backbone}",
            recipe=imagenet(backbone=backbone),
            data=IMAGENET,
            paper=dict(zip(_ERRORS, errors, strict=True)),
        )
    yield Row(
        name="table7/inception-resnet-v2",
        recipe=None,
        data=IMAGENET,
        paper=dict(zip(_ERRORS, (19.6, 4.7), strict=True)),
        missing="a network of others (Szegedy et al. 2016) that the paper only compares with",
    )


ROWS: tuple[Row, ...] = (*_table1(), *_table3(), *_table5(), *_table7())
"""In the order of the paper."""


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows by their names, or by shell patterns such as `table3/*`.

    Raises:
        ValueError: if a name matches nothing.
    """
    found: dict[str, Row] = {}
    for name in names:
        matching = [row for row in ROWS if fnmatch.fnmatchcase(row.name, name)]
        if not matching:
            raise ValueError(f"row: there is no {name!r}; `deformnet reproduce --list` names all")
        found |= {row.name: row for row in matching}
    return list(found.values())


def proposal_recipe(recipe: Recipe) -> RPNRecipe:
    """The region proposal network, trained apart, on whose proposals a row of VOC is trained."""
    return dataclasses.replace(voc_detection(RPNRecipe), seed=recipe.seed)


def choices(row: Row) -> list[str]:
    """Where the paper and the authors' code differ or one is silent: what the row does."""
    recipe = row.recipe
    if recipe is None:
        return []
    if isinstance(recipe, ClassifierRecipe):
        return [
            "schedule: He et al. 2016, whom the paper follows; they divide the learning rate when "
            "the error stalls, here it falls after each third of the iterations",
            "test: one central crop of 224 pixels, as ResNet-101's published 23.6 / 7.1",
        ]
    found = [
        "learning rate 1e-3 on the mean loss of the 8 images, from two thirds of the iterations on "
        "1e-4 (paper); the authors' code has 5e-4 on the loss summed over GPUs, which on eight is "
        "4e-3 on the mean",
        "momentum 0.9, weight decay 5e-4, frozen batch norm, conv1 and conv2: the authors' code "
        "(not in the paper)",
    ]
    if recipe.deform_layers:
        found.append(
            "one group of offsets, made with the dilation of their layer (paper, and its count of "
            "parameters); the code has 4 groups in detection, and dilation 1 in DeepLab"
        )
    if row.starts_from is None:
        found.append(
            "starts from torchvision's ResNet-101, which strides in 3x3 convolutions; the authors' "
            "strides in 1x1 (`stride_in_1x1`, for weights that want it)"
        )
    else:
        found.append(f"starts from a run of {row.starts_from}: there are no public weights")
    if isinstance(recipe, DeepLabRecipe):
        if row.data is CITYSCAPES:
            found.append(
                "19 classes, crops of 768x1024, warm-up of 1000 iterations: the code; the paper "
                "counts a background besides and mentions no crop"
            )
        else:
            found.append("mean IoU at the size of the network's input (360 pixels): the code")
        return found
    found.append(
        "warm-up of 1000 iterations, anchors, thresholds and rounding of the authors' code; 300 "
        "proposals in training and testing"
    )
    if isinstance(recipe, RFCNRecipe):
        found.append("hard example mining over all RoIs: the code (not in the paper)")
    if isinstance(recipe, FasterRCNNRecipe) and recipe.pool == "max":
        found.append("plain RoI pooling takes the maximum: the code")
    if row.fixed_proposals:
        found.append(
            "trained on the fixed proposals of an RPN of its own (paper); the code trains jointly"
        )
    if row.data is COCO:
        found.append(
            "train2017 + val2017 and test-dev2017: the images of the paper's trainval and test-dev"
        )
    if row.testing.scales:
        found.append("sizes 480 576 688 864 1200 1400 (paper; the code has 800 for 864)")
    return found
