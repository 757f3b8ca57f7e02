"""Official data sets: their sources, layouts on disk, and numbers of images."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OfficialSet:
    """A data set that papers report on."""

    name: str
    page: str
    """Download page; some need an account."""
    files: Mapping[str, str]
    """Archives and their sizes (GB = 10^9 bytes)."""
    folders: str
    """Layout on disk after unpacking, one line per kind of file."""
    splits: str
    """Values of `--split`."""
    counts: Mapping[str, int]
    """Number of images in each list, by its name in the check."""


def _in_folder(folder: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f"{folder}/{name}": count for name, count in counts.items()}


OFFICIAL_SETS = (
    OfficialSet(
        name="PASCAL VOC 2007",
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        files={"VOCtrainval_06-Nov-2007.tar": "0.46 GB", "VOCtest_06-Nov-2007.tar": "0.45 GB"},
        folders=(
            "VOCdevkit/VOC2007/ImageSets/Main/<split>.txt\n"
            "VOCdevkit/VOC2007/JPEGImages/<id>.jpg\n"
            "VOCdevkit/VOC2007/Annotations/<id>.xml"
        ),
        splits="VOC2007/trainval, VOC2007/test",
        counts=_in_folder(
            "VOC2007",
            _in_folder("Main", {"train": 2501, "val": 2510, "trainval": 5011, "test": 4952})
            | _in_folder("Segmentation", {"train": 209, "val": 213, "trainval": 422, "test": 210}),
        ),
    ),
    OfficialSet(
        name="PASCAL VOC 2012",
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        files={"VOCtrainval_11-May-2012.tar": "2.0 GB"},
        folders=(
            "VOCdevkit/VOC2012/ImageSets/Main/<split>.txt\n"
            "VOCdevkit/VOC2012/ImageSets/Segmentation/<split>.txt\n"
            "VOCdevkit/VOC2012/JPEGImages/<id>.jpg\n"
            "VOCdevkit/VOC2012/Annotations/<id>.xml\n"
            "VOCdevkit/VOC2012/SegmentationClass/<id>.png"
        ),
        splits="boxes: VOC2007/trainval+VOC2012/trainval; masks: train, val",
        counts=_in_folder(
            "VOC2012",
            _in_folder("Main", {"train": 5717, "val": 5823, "trainval": 11540})
            | _in_folder("Segmentation", {"train": 1464, "val": 1449, "trainval": 2913}),
        ),
    ),
    OfficialSet(
        name="SBD, more masks for VOC 2012",
        page="http://home.bharathh.info/pubs/codes/SBD/download.html",
        files={"benchmark.tgz": "1.4 GB"},
        folders=(
            "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt\n"
            "VOCdevkit/VOC2012/SegmentationClassAug/<id>.png"
        ),
        splits="train_aug",
        counts={"VOC2012/Segmentation/train_aug": 10582},
    ),
    OfficialSet(
        name="COCO 2014",
        page="https://cocodataset.org/#download",
        files={
            "train2014.zip": "13.5 GB",
            "val2014.zip": "6.6 GB",
            "test2015.zip": "about 13 GB",
            "annotations_trainval2014.zip": "0.25 GB",
            "image_info_test2015.zip": "2 MB",
        },
        folders=(
            "annotations/instances_<split>.json\n"
            "annotations/image_info_test-dev2015.json\n"
            "train2014/*.jpg, val2014/*.jpg, test2015/*.jpg"
        ),
        splits="train2014+val2014; test-dev2015 (to submit)",
        counts={
            "instances_train2014": 82783,
            "instances_val2014": 40504,
            "image_info_test-dev2015": 20288,
        },
    ),
    OfficialSet(
        name="COCO 2017",
        page="https://cocodataset.org/#download",
        files={
            "train2017.zip": "19.3 GB",
            "val2017.zip": "0.8 GB",
            "test2017.zip": "6.6 GB",
            "annotations_trainval2017.zip": "0.25 GB",
            "image_info_test2017.zip": "1 MB",
        },
        folders=(
            "annotations/instances_<split>.json\n"
            "annotations/image_info_test-dev2017.json\n"
            "train2017/*.jpg, val2017/*.jpg, test2017/*.jpg"
        ),
        splits="train2017+val2017, or each; test-dev2017 (to submit)",
        counts={
            "instances_train2017": 118287,
            "instances_val2017": 5000,
            "image_info_test-dev2017": 20288,
        },
    ),
    OfficialSet(
        name="Cityscapes, fine labels",
        page="https://www.cityscapes-dataset.com/downloads/",
        files={"leftImg8bit_trainvaltest.zip": "11.6 GB", "gtFine_trainvaltest.zip": "0.25 GB"},
        folders=(
            "leftImg8bit/<split>/<city>/*_leftImg8bit.png\n"
            "gtFine/<split>/<city>/*_gtFine_labelIds.png"
        ),
        splits="train, val",
        counts={"gtFine/train": 2975, "gtFine/val": 500, "gtFine/test": 1525},
    ),
    OfficialSet(
        name="ImageNet (ILSVRC 2012)",
        page="https://image-net.org/download.php",
        files={
            "ILSVRC2012_img_train.tar": "147.9 GB",
            "ILSVRC2012_img_val.tar": "6.7 GB",
            "ILSVRC2012_devkit_t12.tar.gz": "3 MB",
        },
        folders="train/<class>/*.JPEG\nval/<class>/*.JPEG",
        splits="train, val",
        counts={"train": 1281167, "val": 50000},
    ),
)


def official_count(name: str) -> int | None:
    """Number of images in an official list; None for other lists."""
    return next((data.counts[name] for data in OFFICIAL_SETS if name in data.counts), None)


def where_text() -> str:
    """The official data sets as text: page, archives, folders, splits and counts of each."""
    blocks = []
    for data in OFFICIAL_SETS:
        files = ", ".join(f"{name} ({size})" for name, size in data.files.items())
        counts = ", ".join(f"{name} {count}" for name, count in data.counts.items())
        facts = {"from": data.page, "files": files, "splits": data.splits, "images": counts}
        lines = [
            textwrap.fill(
                text,
                width=100,
                initial_indent=f"  {key:8}",
                subsequent_indent=" " * 10,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for key, text in facts.items()
        ]
        folders = textwrap.indent(data.folders, " " * 10).replace(" " * 10, "  folders ", 1)
        blocks.append("\n".join([data.name, *lines[:2], folders, *lines[2:]]))
    return "\n\n".join(blocks)
