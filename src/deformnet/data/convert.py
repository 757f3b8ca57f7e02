"""Conversion of data sets between layouts."""

import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from deformnet._errors import UserError
from deformnet._files import (
    locked_folder,
    naming,
    read_file,
    remove_abandoned_folder,
    write_file,
)
from deformnet.data.base import SegmentationDataset
from deformnet.data.boxes import DetectionDataset
from deformnet.data.files import listing, require_folder
from deformnet.data.opening import (
    detection_splits,
    open_detection,
    open_segmentation,
    segmentation_splits,
)
from deformnet.data.polygons import BACKGROUND
from deformnet.data.writers import COCOWriter, Content, SourceImage, VOCWriter, Writer, YOLOWriter

LayoutName = Literal["coco", "voc", "yolo"]

_WRITERS: dict[LayoutName, type[Writer]] = {
    "coco": COCOWriter,
    "voc": VOCWriter,
    "yolo": YOLOWriter,
}


@dataclass(frozen=True)
class Conversion:
    """Result of `convert`.

    Attributes:
        root: the new data set.
        splits: number of images in each of its splits.
        boxes: number of boxes that were written.
        masks: number of label maps that were written.
        remarks: one sentence about each kind of annotation that was left out.
    """

    root: Path
    splits: Mapping[str, int]
    boxes: int
    masks: int
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        splits = ", ".join(f"{name} ({count} images)" for name, count in self.splits.items())
        masks = f", {self.masks} label maps" if self.masks else ""
        return "\n".join([f"{self.root}: {splits}; {self.boxes} boxes{masks}", *self.remarks])


def convert(
    source: str | Path,
    out: str | Path,
    layout: LayoutName,
    *,
    hard_links: bool = False,
    progress: bool = True,
) -> Conversion:
    """Converts a data set with all its splits to another layout.

    The new data set appears only when it is complete. Image files are copied unchanged. Boxes are
    preserved exactly, even after several conversions; boxes without area are left out. Label maps,
    including those drawn from polygons, are written only in the layout `voc`.

    Args:
        source: folder of a data set in any layout with boxes or, for `voc`, label maps.
        out: new or empty folder.
        layout: `coco`: `annotations/instances_<split>.json` and `images/`. `voc`: `Annotations/`,
            `ImageSets/`, `JPEGImages/`, `SegmentationClass/` and classes.txt. `yolo`: data.yaml,
            `images/<split>/` and `labels/<split>/`.
        hard_links: create hard links to the images (on the same disk) instead of copying them.
        progress: show a progress bar.
    Raises:
        FileNotFoundError: if `source` does not exist or has no known layout.
        FileExistsError: if `out` is not empty.
        UserError: if `source` is malformed or has no annotations that the layout supports.
        OSError: if writing fails; `out` is then left unchanged.
    """
    source = require_folder(Path(source).expanduser())
    out = Path(out).expanduser()
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out}: expected a folder outside the data set, but it is in {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a new or empty folder, but it contains files")
    content, remarks = _read(source, with_masks=layout == "voc")
    with _complete_folder(out) as folder:
        writer = _WRITERS[layout](folder, content)
        for image in tqdm(
            content.images, desc="converting", unit=" images", disable=None if progress else True
        ):
            target = folder / writer.image_folder(image) / image.file
            target.parent.mkdir(parents=True, exist_ok=True)
            if hard_links:
                os.link(image.path.resolve(), target)
            else:
                write_file(target, read_file(image.path), durable=False)
            writer.add(image)
        writer.finish()
    splits = {**content.mask_splits, **content.splits}
    counts = {name: len(images) for name, images in splits.items()}
    remarks = (*remarks, *writer.remarks())
    return Conversion(out, counts, writer.boxes, writer.masks, remarks)


@contextmanager
def _complete_folder(out: Path) -> Iterator[Path]:
    """A folder next to `out`, which is renamed to `out` on success and removed on failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = f"{glob.escape(out.name)}.partial-{'[0-9a-f]' * 16}"
    for left in out.parent.glob(unfinished):
        remove_abandoned_folder(left)
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(8)}")
    partial.mkdir()
    try:
        with locked_folder(partial):
            with naming(out):
                yield partial
            if out.exists():
                out.rmdir()  # empty
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# Reading.


def _read(source: Path, *, with_masks: bool) -> tuple[Content, list[str]]:
    """Boxes and label maps of all splits, and remarks about annotations that are left out."""
    remarks: list[str] = []
    box_splits = _known_splits(detection_splits, source)
    mask_splits = _known_splits(segmentation_splits, source)
    if not box_splits and not (with_masks and mask_splits):
        detection_splits(source)  # raises an error that lists what was expected
    boxes: dict[str, DetectionDataset] = {}
    for split in box_splits:
        images = open_detection(source, split)
        if images.has_ground_truth:
            boxes[_plain(split)] = images
        else:
            remarks.append(f"Split {split} is left out: it has no annotations.")
        if images.dropped:
            remarks.append(f"Split {split}: {images.dropped} boxes without area are left out.")
    masks: dict[str, SegmentationDataset] = {}
    if with_masks:
        masks = {_plain(split): open_segmentation(source, split) for split in mask_splits}
    elif mask_splits:
        remarks.append("Polygons and label maps are left out; use the layout voc to keep them.")
    if not boxes and not masks:
        raise UserError(
            f"{source}: expected a data set with boxes, but found none"
            + ("; use the layout voc for label maps" if mask_splits else "")
        )
    return _collect(source, boxes, masks), remarks


def _known_splits(splits: Callable[[Path], list[str]], source: Path) -> list[str]:
    """Splits of a kind of annotation, possibly none; with the year if VOC has several years."""
    try:
        names = splits(source)
    except FileNotFoundError:
        return []
    return [name for name in names if "/" in name] or names


def _plain(split: str) -> str:
    """A split name as a file name: `VOC2007/test` becomes `VOC2007_test`."""
    return split.replace("/", "_")


def _collect(
    source: Path, boxes: Mapping[str, DetectionDataset], masks: Mapping[str, SegmentationDataset]
) -> Content:
    """Images of all splits; a file in several splits is one image."""
    images = _Images()
    splits: dict[str, list[SourceImage]] = {}
    mask_splits: dict[str, list[SourceImage]] = {}
    # The smallest split first: an image of train and trainval belongs to train.
    for split, of_boxes in sorted(boxes.items(), key=lambda item: len(item[1])):
        splits[split] = [images.of(split, of_boxes, index) for index in range(len(of_boxes))]
        for index, image in enumerate(splits[split]):
            image.boxes = of_boxes, index
    for split, of_masks in sorted(masks.items(), key=lambda item: len(item[1])):
        mask_splits[split] = [images.of(split, of_masks, index) for index in range(len(of_masks))]
        for index, image in enumerate(mask_splits[split]):
            image.masks = of_masks, index
    classes = _common_classes(source, [images.classes for images in boxes.values()])
    mask_classes = _common_classes(source, [images.classes for images in masks.values()])
    objects = mask_classes[mask_classes[:1] == (BACKGROUND,) :]
    if classes and mask_classes and classes != objects:
        _common_classes(source, [classes, objects])
    return Content(
        list(images.by_path.values()),
        {split: splits[split] for split in boxes},
        {split: mask_splits[split] for split in masks},
        classes or objects,
        mask_classes,
    )


class _Images:
    """Images by their files, with unique names."""

    def __init__(self) -> None:
        self.by_path: dict[str, SourceImage] = {}
        self._names: set[str] = set()

    def of(
        self, split: str, images: DetectionDataset | SegmentationDataset, index: int
    ) -> SourceImage:
        """The image of an entry of a data set."""
        path = images.image_path(index)
        key = os.path.abspath(path)  # noqa: PTH100 (links are different images)
        if key not in self.by_path:
            name = images.name(index).removesuffix(path.suffix)
            number = 1
            while name in self._names:
                number += 1
                name = f"{images.name(index)}_{split}" + (f"_{number}" if number > 2 else "")
            self._names.add(name)
            self.by_path[key] = SourceImage(path, name, split)
        return self.by_path[key]


def _common_classes(source: Path, lists: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The classes, which are the same in all splits."""
    for names in lists:
        if names != lists[0]:
            raise UserError(
                f"{source}: expected the same classes in all annotations, but got "
                f"{listing(lists[0], 5)} and {listing(names, 5)}"
            )
    return lists[0] if lists else ()
