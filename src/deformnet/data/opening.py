"""Data sets in any known layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor
from torchvision import tv_tensors

from deformnet.data.base import SegmentationDataset
from deformnet.data.boxes import DetectionDataset
from deformnet.data.cityscapes import CITYSCAPES_MASKS
from deformnet.data.coco import COCO_BOXES
from deformnet.data.coco_masks import COCO_MASKS
from deformnet.data.files import Orientation, subfolders
from deformnet.data.image_folder import IMAGE_FOLDER, ImageFolderClassification
from deformnet.data.labelme import LABELME_BOXES, LABELME_MASKS
from deformnet.data.layouts import Layout
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.masks import FOLDER_MASKS
from deformnet.data.splits import PartOfSplit, Selectable, parse_part, resolve, split_parts
from deformnet.data.survey import survey
from deformnet.data.voc import VOC_BOXES, VOC_MASKS
from deformnet.data.voc_folders import VOC_FOLDERS
from deformnet.data.yolo import YOLO_BOXES, YOLO_MASKS

_Dataset = TypeVar("_Dataset", bound=Selectable)


@dataclass(frozen=True)
class _Kind(Generic[_Dataset]):
    """Data sets with one kind of annotations.

    Attributes:
        annotations: name of the kind.
        networks: networks that train on them.
        layouts: layouts; the first one that recognizes a folder reads it.
    """

    annotations: str
    networks: str
    layouts: tuple[Layout[_Dataset], ...]


_BOXES = _Kind[DetectionDataset](
    "boxes",
    "rfcn or another detector",
    (COCO_BOXES, VOC_BOXES, VOC_FOLDERS, YOLO_BOXES, LABELME_BOXES),
)
_MASKS = _Kind[SegmentationDataset](
    "masks",
    "deeplab",
    (CITYSCAPES_MASKS, VOC_MASKS, COCO_MASKS, YOLO_MASKS, FOLDER_MASKS, LABELME_MASKS),
)
_CLASSES = _Kind[ImageFolderClassification]("folders of classes", "a classifier", (IMAGE_FOLDER,))
_KINDS: tuple[_Kind, ...] = (_BOXES, _MASKS, _CLASSES)

LAYOUTS: tuple[Layout, ...] = tuple(layout for kind in _KINDS for layout in kind.layouts)
"""All layouts. The folders of classes come last: only a folder of no other layout is read so."""

_WRAPPERS = 3  # nested folders that contain only another folder, as in unpacked archives
_TRIED = 20  # subfolders searched for data sets, for messages


def open_detection(
    root: Location,
    split: str,
    transforms: Callable | None = None,
    *,
    orientation: Orientation = "auto",
) -> DetectionDataset:
    """Opens a detection data set and detects its layout.

    Args:
        root: folder in the layout of VOC (the folder with `VOCdevkit`, that folder itself, or one
            of its years), COCO, YOLO or labelme, or with VOC XML files; or `DataFiles` for images
            and annotations in separate places, which form the split `train`.
        split: name of a list file (VOC), the part of a file name after `instances_` (COCO), or name
            of a folder; or several of these joined by `+`. If there is no `val`, it refers to
            `valid`, `validation`, `dev` or `test`. In VOC layout, a name may begin with the folder
            of a year, as in `VOC2007/trainval+VOC2012/trainval`; the default is the last year.
            `train[held-out=0.2]` is a fifth of the images of `train`, selected by their names, and
            `train[without=0.2]` is the rest; `[held-out=0.2,seed=1]` makes another selection.
        transforms: called with (image, annotations), such as `detection_transforms`.
        orientation: use of the EXIF orientation of images; `auto` selects what matches the
            annotated size, and applies the orientation if there is no size.
    Raises:
        FileNotFoundError: if `root` has no known layout or no such split; the message lists what
            was found, or the splits that exist.
        UserError: if the split is empty, an annotation is malformed, or the parts of a union do not
            fit together.
    """
    return _open(_BOXES, root, split, transforms, orientation)


def open_segmentation(
    root: Location,
    split: str,
    transforms: Callable | None = None,
    *,
    orientation: Orientation = "auto",
) -> SegmentationDataset:
    """Opens a segmentation data set and detects its layout.

    Args:
        root: folder in the layout of VOC or Cityscapes, with images and masks, or in the layout of
            COCO, YOLO or labelme with polygons; or `DataFiles`, see `open_detection`.
        split: name of a list file (VOC), of a file (COCO) or of a folder, or several joined by `+`;
            see `open_detection`.
        transforms: called with (image, mask), such as `segmentation_training_transforms`.
        orientation: see `open_detection`.
    Raises:
        FileNotFoundError, UserError: see `open_detection`.
    """
    return _open(_MASKS, root, split, transforms, orientation)


def open_classification(
    root: Location,
    split: str,
    transform: Callable[[tv_tensors.Image], Tensor] | None = None,
    *,
    orientation: Orientation = "auto",
) -> ImageFolderClassification:
    """Opens a data set of class folders.

    Args:
        root: folder with `<split>/<class>/<image>`, or `<class>/<image>` for the split `train`.
        split: name of a folder, or several joined by `+`; see `open_detection`.
        transform: called with an image.
        orientation: see `open_detection`.
    Raises:
        FileNotFoundError, UserError: see `open_detection`.
    """
    return _open(_CLASSES, root, split, transform, orientation)


def detection_splits(root: Location) -> list[str]:
    """Splits that `open_detection` takes, without unions and VOC's lists of one class.

    In the VOC layout, the splits of the last year; with several years also those of every year,
    with its folder.

    Raises:
        FileNotFoundError: if `root` has no known layout.
    """
    return _splits(_BOXES, root)


def segmentation_splits(root: Location) -> list[str]:
    """Splits that `open_segmentation` takes, as `detection_splits`."""
    return _splits(_MASKS, root)


def classification_splits(root: Location) -> list[str]:
    """Splits that `open_classification` accepts; see `detection_splits`."""
    return _splits(_CLASSES, root)


@dataclass(frozen=True)
class _Found(Generic[_Dataset]):
    """A data set and its layout."""

    place: DataFiles
    layout: Layout[_Dataset]

    @property
    def splits(self) -> list[str]:
        return ["train"] if self.place.are_apart else self.layout.splits(self.place.annotations)

    def open(self, split: str, transforms: Callable | None, orientation: Orientation) -> _Dataset:
        location = self.place if self.place.are_apart else self.place.annotations
        return self.layout.open(location, split, transforms, orientation=orientation)


def _open(
    kind: _Kind[_Dataset],
    location: Location,
    split: str,
    transforms: Callable | None,
    orientation: Orientation,
) -> _Dataset:
    parts = [parse_part(name) for name in split_parts(split)]
    found = _find(kind, location)
    known = found.splits
    if not known and _other_kind(found.place.annotations, [kind]):
        raise FileNotFoundError(what_was_found(found.place.annotations, kind.annotations))
    names = [resolve(known, part.name) for part in parts]
    images = found.open("+".join(names), transforms, orientation)
    if all(part.fraction is None for part in parts):
        return images
    if len(parts) == 1:
        lengths = [len(images)]
    else:
        lengths = [len(found.open(name, None, orientation)) for name in names]
    return images.subset(_chosen(images, parts, lengths), split)


def _chosen(images: Selectable, parts: Sequence[PartOfSplit], lengths: Sequence[int]) -> list[int]:
    """Indices of the images in parts of splits, given the number of images in each whole split."""
    chosen: list[int] = []
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        names = [images.name(index) for index in range(start, start + length)]
        chosen += [start + index for index in part.choose(names)]
        start += length
    return chosen


def _splits(kind: _Kind[_Dataset], location: Location) -> list[str]:
    return _find(kind, location).splits


def _find(kind: _Kind[_Dataset], location: Location) -> _Found[_Dataset]:
    place = locate(location)
    if place.are_apart:
        for layout in kind.layouts:
            if layout.recognizes_files(place):
                return _Found(place, layout)
        raise FileNotFoundError(_refuse_files(place, kind.annotations))
    root = place.annotations
    for _ in range(_WRAPPERS):
        layout = _recognized(kind, root)
        if layout is not None:
            return _Found(DataFiles(root, root), layout)
        inner = _only_folder(root)
        if inner is None:
            break
        root = inner
    raise FileNotFoundError(what_was_found(place.annotations, kind.annotations))


def _recognized(kind: _Kind[_Dataset], root: Path) -> Layout[_Dataset] | None:
    """The layout of a folder; preferably one with splits of this kind."""
    without_splits = None
    for layout in kind.layouts:
        if layout.recognizes(root):
            if layout.splits(root):
                return layout
            without_splits = without_splits or layout
    return without_splits


def _only_folder(root: Path) -> Path | None:
    """The only visible entry of a folder, if it is a folder."""
    visible = [path for path in root.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    return visible[0] if len(visible) == 1 and visible[0].is_dir() else None


# Messages about folders that no layout fits.


def what_was_found(root: Path, wanted: str | None = None) -> str:
    """Message about the contents of a folder, and what to do next.

    Args:
        wanted: expected annotations, such as boxes; None for any.
    """
    found = survey(root)
    kinds = [kind for kind in _KINDS if wanted in (None, kind.annotations)]
    files = dict.fromkeys(f"{it.files} ({it.name})" for kind in kinds for it in kind.layouts)
    expected = f"expected a data set with {' or '.join(files)}"
    start = f"{root}: found {found}"
    other = _other_kind(root, kinds)
    if other is not None:
        return (
            f"{root}: expected {wanted}, but found {other.annotations}; train {other.networks}, or "
            f"add {wanted} ({expected})"
        )
    inner = _data_set_below(root, kinds)
    if inner is not None:
        return f"{start}; the data set is in {inner}; pass that folder"
    advice = found.advice()
    if not advice and found.has_images and not found.has_annotations:
        advice = ["add annotations, or pass --images and --annotations if they are elsewhere"]
    return "; ".join([start, *advice, expected])


def _other_kind(root: Path, kinds: Sequence[_Kind]) -> _Kind | None:
    """The kind of data set in a folder, other than the given kinds."""
    return next((kind for kind in _KINDS if kind not in kinds and _holds(kind, root)), None)


def _holds(kind: _Kind, root: Path) -> bool:
    layout = _recognized(kind, root)
    return layout is not None and bool(layout.splits(root))


def _data_set_below(root: Path, kinds: Sequence[_Kind]) -> Path | None:
    try:
        folders = subfolders(root)[:_TRIED]
        return next((it for it in folders if any(_holds(kind, it) for kind in kinds)), None)
    except (ValueError, OSError):
        return None  # an unreadable folder


def _refuse_files(place: DataFiles, wanted: str) -> str:
    """Message about separate annotations that have no known layout."""
    other = next(
        (
            kind
            for kind in _KINDS
            if kind.annotations != wanted
            and any(layout.recognizes_files(place) for layout in kind.layouts)
        ),
        None,
    )
    if other is not None:
        return f"{place}: expected {wanted}, but found {other.annotations}; train {other.networks}"
    path = place.annotations
    found = f"found {survey(path)}" if path.is_dir() else "got a file of another kind"
    return (
        f"{path}: expected {wanted} (a COCO JSON file, or a folder of XML files, YOLO text files, "
        f"labelme JSON files or masks), but {found}"
    )
