"""Rows of Tables 1, 3, 5 and 7 of Dai et al. 2017: network, data, schedule and published numbers.

Rows that differ only in test-time augmentation, or that appear in two tables, share a training run.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deformnet._errors import UserError
from deformnet.recipes import (
    BackboneName,
    ClassAwareRPNRecipe,
    DeformLayers,
    DetectorRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    RPNRecipe,
    ScoreAt,
    TestTimeAugmentation,
    cityscapes,
    coco_detection,
    imagenet,
    voc2012,
    voc_detection,
)

_DETECTION_CHOICE = (
    "warmup of 1000 iterations, anchors, thresholds and rounding: authors' code; 300 proposals in "
    "training and testing"
)


@dataclass(frozen=True)
class DataSet:
    """A data set of the paper.

    Attributes:
        key: short name, used in the names of runs.
        title: full name.
        classes: number of classes of the network, including the background class of DeepLab.
        train, test: splits, as accepted by `deformnet train`.
        choices: settings where the paper and the authors' code differ.
    """

    key: Literal["voc-seg", "cityscapes", "voc", "coco", "imagenet"]
    title: str
    classes: int
    train: str
    test: str
    choices: tuple[str, ...]


VOC_SEGMENTATION = DataSet(
    "voc-seg",
    "PASCAL VOC 2012 with SBD's masks",
    21,
    "train_aug",
    "val",
    ("mean IoU at the size of the network's input (short side 360 pixels): authors' code",),
)
CITYSCAPES = DataSet(
    "cityscapes",
    "Cityscapes (fine)",
    19,
    "train",
    "val",
    (
        "19 classes, crops of 768x1024, warmup of 1000 iterations: authors' code; the paper also "
        "counts a background class and mentions no crop",
    ),
)
VOC_DETECTION = DataSet(
    "voc",
    "PASCAL VOC 2007 + 2012",
    20,
    "VOC2007/trainval+VOC2012/trainval",
    "VOC2007/test",
    (_DETECTION_CHOICE,),
)
# The same images as the splits of 2014 and 2015, for which the server accepts no results anymore.
COCO = DataSet(
    "coco",
    "COCO",
    80,
    "train2017+val2017",
    "test-dev2017",
    (
        _DETECTION_CHOICE,
        "train2017 + val2017 and test-dev2017: the images of the paper's trainval and test-dev",
    ),
)
IMAGENET = DataSet(
    "imagenet",
    "ImageNet-1K",
    1000,
    "train",
    "val",
    (
        "schedule: He et al. 2016, which the paper follows; they divide the learning rate when the "
        "error plateaus, here it drops after each third of the iterations",
        "test: one central crop of 224 pixels, as for the published 23.6 / 7.1 of ResNet-101",
    ),
)

_FINE_TUNING_CHOICES = (
    "learning rate: 1e-3 on the mean loss of 8 images, 1e-4 in the last third of the iterations "
    "(paper); the authors' code uses 5e-4 on the loss summed over GPUs, 4e-3 on the mean for eight "
    "GPUs",
    "momentum 0.9, weight decay 5e-4, frozen batch norm, conv1 and conv2: authors' code (not in "
    "the paper)",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: a recipe, its data and its published numbers.

    Attributes:
        name: table and row, such as `table1/rfcn-3`.
        recipe: network and schedule; None for a network that is not implemented.
        data: data set of training and testing.
        paper: published numbers in percent, by metric.
        augmentation: test-time augmentation of a detector.
        score_at: resolution of the label maps that are scored; see `deformnet.engine.evaluate`.
        fixed_proposals: whether it trains on the proposals of a separately trained RPN.
        starts_from: name of the row whose run initializes the backbone, where no public weights
            exist.
        missing: why there is no recipe.
    """

    name: str
    recipe: Recipe | None
    data: DataSet
    paper: Mapping[str, float]
    augmentation: TestTimeAugmentation = TestTimeAugmentation()  # noqa: RUF009 (it is frozen)
    score_at: ScoreAt = "original"
    fixed_proposals: bool = False
    starts_from: str | None = None
    missing: str | None = None

    @property
    def run(self) -> str:
        """Name of the training run; rows with the same training share it."""
        assert self.recipe is not None
        settings = self.recipe.to_dict()
        parts = [self.data.key, self.recipe.network]
        if self.recipe.backbone != "resnet101" or self.data is IMAGENET:
            parts.append(self.recipe.backbone)
        if self.data is not IMAGENET:
            parts.append(f"conv{self.recipe.deform_layers}")
        if settings.get("dilation", 2) != 2:
            parts.append(f"dilation{settings['dilation']}")
        if "pool" in settings:
            parts.append(f"{settings['pool']}-pool")
        return "-".join(parts)

    @property
    def choices(self) -> tuple[str, ...]:
        """Settings where the paper and the authors' code differ, or one of them is silent."""
        if self.recipe is None or self.data is IMAGENET:
            return () if self.recipe is None else self.data.choices
        choices = [*_FINE_TUNING_CHOICES]
        if self.recipe.deform_layers:
            choices.append(
                "one offset group; offsets use the dilation of their layer (paper, and its "
                "parameter counts); the code uses 4 groups in detection and dilation 1 in DeepLab"
            )
        choices.append(
            "initialized from torchvision's ResNet-101, which strides in 3x3 convolutions; the "
            "authors' strides in 1x1 convolutions (see `stride_in_1x1`)"
            if self.starts_from is None
            else f"initialized from a run of {self.starts_from}: no public weights exist"
        )
        choices += self.data.choices
        if self.recipe.network == RFCNRecipe.network:
            choices.append(
                "online hard example mining over all RoIs: authors' code (not in the paper)"
            )
        if self.recipe.to_dict().get("pool") == "max":
            choices.append("RoI pooling without offsets is max pooling: authors' code")
        if self.fixed_proposals:
            choices.append(
                "trained on the fixed proposals of a separately trained RPN (paper); the code "
                "trains jointly"
            )
        if self.augmentation.scales:
            choices.append(
                "scales 480 576 688 864 1200 1400 (paper; the code uses 800 instead of 864)"
            )
        return tuple(choices)


_MEAN_IOU = "mean IoU"
_VOC_AP = ("mAP@0.5", "mAP@0.7")
_COCO_AP = ("AP", "AP50", "APsmall", "APmedium", "APlarge")
_ERRORS = ("top-1 error", "top-5 error")

# Tables 1 and 3: mean IoU on VOC and Cityscapes; then mAP at IoU 0.5 and 0.7 of class-aware RPN,
# Faster R-CNN and R-FCN.
_Pair = tuple[float, float]
_Line = tuple[_Pair, _Pair, _Pair, _Pair]
_TABLE1: dict[DeformLayers, _Line] = {
    0: ((69.7, 70.4), (68.0, 44.9), (78.1, 62.1), (80.0, 61.8)),
    1: ((73.9, 73.5), (73.5, 54.4), (78.6, 63.8), (80.6, 63.0)),
    2: ((74.8, 74.4), (74.3, 56.3), (78.5, 63.3), (81.0, 63.8)),
    3: ((75.2, 75.2), (74.5, 57.2), (78.6, 63.3), (81.4, 64.7)),
    6: ((74.8, 75.1), (74.6, 57.7), (78.7, 64.0), (81.5, 65.4)),
}
_TABLE3_ATROUS: dict[int, _Line] = {
    2: ((69.7, 70.4), (68.0, 44.9), (78.1, 62.1), (80.0, 61.8)),
    4: ((73.1, 71.9), (72.8, 53.1), (78.6, 63.1), (80.5, 63.0)),
    6: ((73.6, 72.7), (73.6, 55.2), (78.5, 62.3), (80.2, 63.5)),
    8: ((73.2, 72.4), (73.2, 55.1), (77.8, 61.8), (80.3, 63.2)),
}
# Table 1 has 75.2 for DeepLab with three layers on VOC.
_TABLE3_CONV: _Line = ((75.3, 75.2), (74.5, 57.2), (78.6, 63.3), (81.4, 64.7))
_TABLE3_POOL: tuple[_Pair, _Pair] = ((78.3, 66.6), (81.2, 65.0))
_TABLE3_BOTH: tuple[_Pair, _Pair] = ((79.3, 66.9), (82.6, 68.5))

_Five = tuple[float, float, float, float, float]
_Lines = tuple[tuple[type[DetectorRecipe], str, _Five, _Five], ...]
# Network, suffix of the row, plain, deformable.
_TABLE5: _Lines = (
    (ClassAwareRPNRecipe, "", (23.2, 42.6, 6.9, 27.1, 35.1), (25.8, 45.9, 7.2, 28.3, 40.7)),
    (FasterRCNNRecipe, "", (29.4, 48.0, 9.0, 30.5, 47.1), (33.1, 50.3, 11.6, 34.9, 51.2)),
    (RFCNRecipe, "", (30.8, 52.6, 11.8, 33.9, 44.8), (34.5, 55.0, 14.0, 37.7, 50.3)),
)
_TABLE5_ALIGNED: _Lines = (
    (FasterRCNNRecipe, "", (30.8, 49.6, 9.6, 32.5, 49.0), (34.1, 51.1, 12.2, 36.5, 52.4)),
    (RFCNRecipe, "", (32.9, 54.5, 12.5, 36.3, 48.3), (36.1, 56.7, 14.8, 39.8, 52.2)),
    (RFCNRecipe, "-m", (34.5, 55.0, 16.8, 37.3, 48.3), (37.1, 57.3, 18.8, 39.7, 52.3)),
    (RFCNRecipe, "-m-b", (35.5, 55.6, 17.8, 38.4, 49.3), (37.5, 58.0, 19.4, 40.1, 52.5)),
)
_SCALES = (480, 576, 688, 864, 1200, 1400)
_AUGMENTATIONS = {
    "": TestTimeAugmentation(),
    "-m": TestTimeAugmentation(scales=_SCALES),
    "-m-b": TestTimeAugmentation(scales=_SCALES, refine=2, box_averaging=True),
}

_TABLE7: dict[BackboneName, _Pair] = {
    "resnet101": (23.6, 7.1),
    "aligned-inception-resnet": (22.1, 6.0),
}


def _all_networks(
    prefix: str, numbers: _Line, *, layers: DeformLayers, dilation: int = 2
) -> Iterator[Row]:
    """Yield a line of Table 1 or 3: five rows, none with deformable RoI pooling."""
    (voc, city), *detectors = numbers
    table, _, variant = prefix.partition("/")
    for key, recipe, data, mean_iou in (
        ("voc", voc2012(), VOC_SEGMENTATION, voc),
        ("cityscapes", cityscapes(), CITYSCAPES, city),
    ):
        yield Row(
            name=f"{table}/deeplab-{key}-{variant}",
            recipe=dataclasses.replace(recipe, deform_layers=layers, dilation=dilation),
            data=data,
            paper={_MEAN_IOU: mean_iou},
            score_at="network" if data is VOC_SEGMENTATION else "original",
        )
    networks = (ClassAwareRPNRecipe, FasterRCNNRecipe, RFCNRecipe)
    for network, pair in zip(networks, detectors, strict=True):
        plain = voc_detection(network).baseline()
        recipe = dataclasses.replace(plain, deform_layers=layers, dilation=dilation)
        yield _voc_row(f"{table}/{network.network}-{variant}", recipe, pair)


def _voc_row(name: str, recipe: Recipe, numbers: _Pair) -> Row:
    return Row(
        name=name,
        recipe=recipe,
        data=VOC_DETECTION,
        paper=dict(zip(_VOC_AP, numbers, strict=True)),
        fixed_proposals=recipe.takes_proposals,
    )


def _table1() -> Iterator[Row]:
    for layers, numbers in _TABLE1.items():
        yield from _all_networks(f"table1/{layers}", numbers, layers=layers)


def _table3() -> Iterator[Row]:
    for dilation, numbers in _TABLE3_ATROUS.items():
        yield from _all_networks(f"table3/atrous-{dilation}", numbers, layers=0, dilation=dilation)
    yield from _all_networks("table3/conv", _TABLE3_CONV, layers=3)
    for variant, layers, numbers in (("pool", 0, _TABLE3_POOL), ("conv-pool", 3, _TABLE3_BOTH)):
        for network, pair in zip((FasterRCNNRecipe, RFCNRecipe), numbers, strict=True):
            recipe = dataclasses.replace(voc_detection(network), deform_layers=layers)
            yield _voc_row(f"table3/{network.network}-{variant}", recipe, pair)


def _table5() -> Iterator[Row]:
    for aligned, lines in (("", _TABLE5), ("-aligned", _TABLE5_ALIGNED)):
        for network, suffix, plain, deformable in lines:
            recipe = coco_detection(network)
            if aligned:
                recipe = dataclasses.replace(recipe, backbone="aligned-inception-resnet", init=None)
            plain_row = ("plain", recipe.baseline(), plain)
            for kind, chosen, numbers in (plain_row, ("deformable", recipe, deformable)):
                yield Row(
                    name=f"table5/{network.network}{aligned}-{kind}{suffix}",
                    recipe=chosen,
                    data=COCO,
                    paper=dict(zip(_COCO_AP, numbers, strict=True)),
                    augmentation=_AUGMENTATIONS[suffix],
                    starts_from="table7/aligned-inception-resnet" if aligned else None,
                )


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
        missing="a network of Szegedy et al. 2016 that the paper only compares with",
    )


ROWS: tuple[Row, ...] = (*_table1(), *_table3(), *_table5(), *_table7())
"""All rows, in the order of the paper."""


def find_rows(names: Sequence[str]) -> list[Row]:
    """Find rows by name or shell pattern, such as `table3/*`.

    Raises:
        UserError: if a name matches no row.
    """
    found: dict[str, Row] = {}
    for name in names:
        matching = [row for row in ROWS if fnmatch.fnmatchcase(row.name, name)]
        if not matching:
            raise UserError(
                f"expected rows to be names or patterns of rows, but got {name!r}, which matches "
                "none; `deformnet paper reproduce --list` shows all rows"
            )
        found |= {row.name: row for row in matching}
    return list(found.values())


def proposal_recipe(recipe: Recipe) -> RPNRecipe:
    """Return the recipe of the RPN whose fixed proposals a row of VOC is trained on."""
    return dataclasses.replace(voc_detection(RPNRecipe), seed=recipe.seed)
