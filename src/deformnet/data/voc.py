"""PASCAL VOC's layout for semantic segmentation and detection (Everingham et al. 2010)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

from deformnet._errors import UserError
from deformnet._files import read_lines
from deformnet.data import voc_files
from deformnet.data.base import IGNORE, LabeledImage, SegmentationDataset
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import Folder, listing, read_size
from deformnet.data.items import BoxesItem, LabelsItem
from deformnet.data.layouts import ImageList, Layout, Missing, find_file
from deformnet.data.splits import Part, require_union


@final
class VOCSegmentation(SegmentationDataset):
    """Images and label maps in the VOC layout.

    ```
    classes.txt                                     optional
    VOCdevkit/VOC2012/
      ImageSets/Segmentation/<split>.txt            one image id per line
      JPEGImages/<id>.jpg (or .png)
      SegmentationClass/<id>.png                    class ids, mode P or L; 255 is void
      SegmentationClassAug/<id>.png                 optional, for `train_aug`
    ```

    `root` is the folder that holds VOCdevkit, VOCdevkit itself or the folder of a year.

    A split is any list file: train, val, trainval, test or a custom one, with the folder of its
    year (`VOC2012/train`) or of the last year, since VOC2012 includes the segmentations of earlier
    years. Several are joined by `+`.

    The list `train_aug` (10,582 images) unites VOC's 1,464 training masks with those of SBD
    (Hariharan et al. 2011) without VOC's val images. Its masks are looked up in
    SegmentationClassAug, image by image, and in SegmentationClass if that folder lacks one, since
    archives differ in whether they include VOC's own masks. Its lines are ids or pairs of paths
    (`/JPEGImages/x.jpg /SegmentationClassAug/x.png`), two forms in circulation.

    `classes.txt` names the classes in the order of their ids, one per line, from id 0. Lists of
    objects, as detection data sets have them, omit `background`; it is prepended if the list is
    VOC's 20 objects, or if a mask has an id one beyond the list. Without `classes.txt` the classes
    are VOC's 21.
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, list (the message says which splits exist),
                image or mask.
            UserError: for an empty or malformed list or classes.txt, and for parts of a union that
                differ in their classes or share an image.
        """
        root = Path(root).expanduser()
        parts = _MASKS.read_union(root, split)
        samples = [
            LabeledImage(image.stem, image, mask)
            for images, _ in parts
            for image, mask in images.pairs
        ]
        classes = parts[0][1]
        super().__init__(
            *(root, split, samples, classes.names, transforms), classes_from=f" {classes.origin}"
        )
        self._advice = classes.advice

    def _wrong_label(self, path: Path, label: int) -> str:
        message = f"{super()._wrong_label(path, label)}; {self._advice}"
        if label == len(self.classes) and self.classes[0] != "background":
            message += ", or, if id 0 is the background, insert 'background' as its first line"
        return message


@final
class VOCDetection(DetectionDataset):
    """Images and boxes in the VOC layout.

    ```
    classes.txt                                     optional
    VOCdevkit/VOC2012/
      ImageSets/Main/<split>.txt                    one image id per line
      JPEGImages/<id>.jpg (or .png)
      Annotations/<id>.xml
    ```

    `root` and splits as for `VOCSegmentation`; the paper's training set is
    `VOC2007/trainval+VOC2012/trainval`. Lists of one class (`cat_train`) have a second field, 1, 0
    or -1, whether the class is in the image: it is ignored, and all images of the list are read
    with the objects of all classes.

    Difficult objects are ignored, truncated ones are like any other. The files name the first and
    last pixel of a box, counted from 1. A box of a single pixel, as an accidental click leaves it,
    has no area here.

    `classes.txt` names the classes, one per line, in the order of the labels; a `background` in the
    first line is skipped. Without it the classes are VOC's 20.
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, list (the message says which splits exist),
                image or XML file.
            UserError: for an empty or malformed list or classes.txt, an XML file that is broken or
                has an object of an unknown class, and for parts of a union that differ in their
                classes or share an image.
        """
        root = Path(root).expanduser()
        files: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        parts = _BOXES.read_union(root, split)
        for images, classes in parts:
            for image, xml in images.pairs:
                content = voc_files.parse_annotation(xml)
                for item in content.iterfind("object"):
                    objects.add(len(files), *voc_files.read_object(xml, item, classes))
                size = voc_files.annotated_size(content) or read_size(image)
                # The folder of a year given as "." has no name, and is its own parent.
                file = Path(image.parent.parent.name, "JPEGImages", image.name)
                files.append(ImageFile(image.stem, str(file), size))
        years = voc_files.find_years(root)[0].parent
        super().__init__(root, split, years, files, objects, parts[0][1].names, transforms)


class _Lists(NamedTuple):
    """The lists of images with one kind of annotation."""

    folder: str
    """Name in ImageSets."""
    names: Callable[[Path], list[str]]
    """Names of the lists of a year that are splits."""
    classes: Callable[[Path], voc_files.ClassList]
    """Classes of a year."""
    fill: Callable[[ImageList, Path, voc_files.ClassList], None]
    """Adds the images of a list of a year."""

    def splits(self, root: Path) -> list[str]:
        return voc_files.splits_of_years(root, self.names)

    def read_union(self, root: Path, split: str) -> list[tuple[ImageList, voc_files.ClassList]]:
        """The lists of a union of splits, without problems, and their classes."""
        parts: list[tuple[ImageList, voc_files.ClassList]] = []
        for year, name in voc_files.find_lists(root, split):
            images, classes = self._list(year, name), self.classes(year)
            if not images.source.is_file():
                splits = listing(self.splits(root))
                raise FileNotFoundError(f"{images.source}: no such list; the splits are: {splits}")
            self.fill(images, year, classes)
            images.require()
            parts.append((images, classes))
        require_union(
            [
                Part(str(images.source), classes.names, [image.stem for image, _ in images.pairs])
                for images, classes in parts
            ]
        )
        return parts

    def in_folder(self, root: Path) -> Iterator[ImageList]:
        """All lists, with their problems."""
        for year in voc_files.voc_years(root):
            try:
                names = self.names(year)
            except ValueError:  # a bad classes.txt, reported for every list
                names = voc_files.list_names(year, self.folder)
            for name in names:
                images = self._list(year, name)
                with images.noting_errors():
                    self.fill(images, year, self.classes(year))
                yield images

    def _list(self, year: Path, name: str) -> ImageList:
        path = year / f"ImageSets/{self.folder}/{name}.txt"
        return ImageList(f"{year.absolute().name}/{self.folder}/{name}", path)


def _fill_masks(images: ImageList, year: Path, classes: voc_files.ClassList) -> None:
    allowed = bytes([*range(len(classes.names)), IGNORE])
    images.pair_item = partial(LabelsItem, allowed=allowed)
    images.may_be_official = classes.is_default
    folders = [Folder(year / "JPEGImages")], [Folder(year / "SegmentationClass")]
    if images.source.stem == "train_aug":
        folders[1].insert(0, Folder(year / "SegmentationClassAug"))
    for fields in _read_fields(images.source):
        if len(fields) == 1:
            name = fields[0]
            image = find_file("images", folders[0], f"{name}.jpg", f"{name}.png")
            images.add(image, find_file("label maps", folders[1], f"{name}.png"))
        elif len(fields) == 2:
            image, mask = (year / field.lstrip("/") for field in fields)
            images.add(_existing("images", image), _existing("label maps", mask))
        else:
            images.fault(f"expected an id or two paths per line, but got {' '.join(fields)!r}")


def _fill_boxes(images: ImageList, year: Path, classes: voc_files.ClassList) -> None:
    images.pair_item = partial(BoxesItem, classes=classes)
    images.may_be_official = classes.is_default
    folders = [Folder(year / "JPEGImages")], [Folder(year / "Annotations")]
    seen: set[str] = set()
    for name, *rest in _read_fields(images.source):
        if rest not in ([], ["1"], ["0"], ["-1"]):
            line = " ".join([name, *rest])
            images.fault(f"expected an id, or an id and 1, 0 or -1, per line, but got {line!r}")
        elif name in seen:
            images.fault(f"lists {name} more than once")
        else:
            seen.add(name)
            image = find_file("images", folders[0], f"{name}.jpg", f"{name}.png")
            images.add(image, find_file("annotations", folders[1], f"{name}.xml"))


def _read_fields(path: Path) -> list[list[str]]:
    """Fields of each line of a list."""
    lines = [line.split() for line in read_lines(path)]
    if not lines:
        raise UserError(f"{path}: expected image ids, but the list is empty")
    return lines


def _existing(kind: str, path: Path) -> Path | Missing:
    return path if path.is_file() else Missing(kind, (str(path.parent),), path.name)


_MASKS = _Lists(
    "Segmentation",
    lambda year: voc_files.list_names(year, "Segmentation"),
    voc_files.read_mask_classes,
    _fill_masks,
)
_BOXES = _Lists("Main", voc_files.box_lists, voc_files.read_box_classes, _fill_boxes)


def _is_voc(root: Path) -> bool:
    return bool(voc_files.voc_years(root))


def _folders(root: Path) -> set[Path]:
    years = voc_files.voc_years(root)
    return {*years, *(year.parent for year in years if year.parent != root)}


VOC_MASKS = Layout[SegmentationDataset](
    "VOC", voc_files.YEARS, _is_voc, _MASKS.splits, _MASKS.in_folder, VOCSegmentation, _folders
)
VOC_BOXES = Layout[DetectionDataset](
    "VOC", voc_files.YEARS, _is_voc, _BOXES.splits, _BOXES.in_folder, VOCDetection, _folders
)
