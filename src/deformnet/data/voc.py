"""PASCAL VOC's layout for semantic segmentation and detection (Everingham et al. 2010)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar, final

from deformnet._errors import UserError
from deformnet._files import matching, read_lines
from deformnet.data import voc_files
from deformnet.data.base import LabeledImage, MaskFileDataset, SegmentationDataset
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import Folder, Orientation, Size, inside, listing, read_size
from deformnet.data.items import BoxesItem, LabelsItem
from deformnet.data.layouts import ImageList, Layout, Missing, find_file, find_image_file
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.mask_reader import MaskReader, choose_reader, note_void
from deformnet.data.palette import find_class_file
from deformnet.data.splits import Part, require_union
from deformnet.data.voc_files import VOC_CLASSES


@final
class VOCSegmentation(MaskFileDataset):
    """Images and label maps in the VOC layout.

    ```
    classes.txt                                     optional
    VOCdevkit/VOC2012/
      ImageSets/Segmentation/<split>.txt            one image id per line
      JPEGImages/<id>.jpg                           or any other image suffix
      SegmentationClass/<id>.png                    class ids (255 is void), or colors
      SegmentationClassAug/<id>.png                 optional, for `train_aug`
    ```

    `root` is the folder that contains VOCdevkit, VOCdevkit itself, or the folder of a year.

    A split is any list file: train, val, trainval, test or a custom one, with the folder of its
    year (`VOC2012/train`) or of the last year, since VOC2012 includes the segmentations of earlier
    years. Several are joined by `+`.

    The list `train_aug` (10,582 images) unites VOC's 1,464 training masks with those of SBD
    (Hariharan et al. 2011) without VOC's val images. Its masks are looked up in
    SegmentationClassAug, image by image, and in SegmentationClass if that folder lacks one, since
    archives differ in whether they include VOC's own masks. Its lines are ids or pairs of paths
    (`/JPEGImages/x.jpg /SegmentationClassAug/x.png`), two forms in circulation.

    `classes.txt` lists the classes in the order of their ids, one per line, from id 0. The class
    lists of detection data sets omit `background`; it is prepended if the list is VOC's 20 objects,
    or if a mask has an id one beyond the list. Without such a file, the classes are VOC's 21.
    CVAT's `labelmap.txt` and the other files of `deformnet.data.palette` also list colors. Masks
    with only 0 and 255 are read as 0 and 1 if there are two classes or the classes are unknown.
    """

    def __init__(
        self,
        root: Location,
        split: str,
        transforms: Callable | None = None,
        *,
        orientation: Orientation = "auto",
    ) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, list (the message says which splits exist),
                image or mask.
            UserError: for an empty or malformed list or classes.txt, and for parts of a union that
                differ in their classes or share an image.
        """
        root = locate(root).annotations
        parts = _MASKS.read_union(root, split)
        samples = [
            LabeledImage(_name(image), image, mask)
            for images, _ in parts
            for image, mask in images.pairs
        ]
        reader = parts[0][1].reader
        super().__init__(root, split, samples, reader, transforms, orientation)


@final
class VOCDetection(DetectionDataset):
    """Images and boxes in the VOC layout.

    ```
    classes.txt                                     optional
    VOCdevkit/VOC2012/
      ImageSets/Main/<split>.txt                    one image id per line
      JPEGImages/<id>.jpg                           or any other image suffix
      Annotations/<id>.xml
    ```

    See `VOCSegmentation` for `root` and splits; the paper's training set is
    `VOC2007/trainval+VOC2012/trainval`. Lists of one class (`cat_train`) have a second field (1, 0
    or -1) that tells whether the class is in the image. It is ignored: all images of the list are
    read with the objects of all classes.

    Difficult objects are ignored; truncated objects are not. The files store the first and last
    pixel of a box, counted from 1. A box of a single pixel, usually an accidental click, has no
    area here.

    `classes.txt` lists the classes, one per line, in the order of the labels; a `background` in the
    first line is skipped. Without it, the classes are VOC's 20 or, if an object of any split has
    another name, the sorted names of all objects.
    """

    def __init__(
        self,
        root: Location,
        split: str,
        transforms: Callable | None = None,
        *,
        orientation: Orientation = "auto",
    ) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, list (the message says which splits exist),
                image or XML file.
            UserError: for an empty or malformed list or classes.txt, an XML file that is broken or
                has an object of an unknown class, and for parts of a union that differ in their
                classes or share an image.
        """
        root = locate(root).annotations
        files: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        parts = _BOXES.read_union(root, split)
        # The folder of a year given as "." has no name, and is its own parent.
        years = voc_files.find_years(root)[0].parent
        for images, classes in parts:
            for image, xml in images.pairs:
                size = add_objects(objects, len(files), xml, classes)
                size = size or read_size(image, orientation=orientation)
                files.append(ImageFile(_name(image), str(image.relative_to(years)), size))
        super().__init__(
            *(root, split, years, files, objects, parts[0][1].names, transforms),
            orientation=orientation,
        )


def add_objects(
    objects: ObjectList, image: int, xml: Path, classes: voc_files.ClassList
) -> Size | None:
    """Adds the objects in the XML file of an image; returns its annotated size.

    Raises:
        UserError: if the file or an object is malformed.
    """
    content = voc_files.parse_annotation(xml)
    for item in content.iterfind("object"):
        objects.add(image, *voc_files.read_object(xml, item, classes))
    return voc_files.annotated_size(content)


class _Classes(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...


class _MaskClasses(NamedTuple):
    """Classes of the masks of a year."""

    names: tuple[str, ...]
    reader: MaskReader
    is_default: bool
    """Whether the classes are VOC's by default, without a class file."""


_C = TypeVar("_C", bound=_Classes)


class _Lists(NamedTuple, Generic[_C]):
    """The lists of images with one kind of annotation."""

    folder: str
    """Name in ImageSets."""
    names: Callable[[Path], list[str]]
    """Names of the lists of a year that are splits."""
    classes: Callable[[Path], _C]
    """Classes of a year."""
    fill: Callable[[ImageList, Path, _C], None]
    """Adds the images of a list of a year."""
    note: Callable[[ImageList, _C], None]
    """Adds faults of the list as a whole."""

    def splits(self, root: Path) -> list[str]:
        return voc_files.splits_of_years(root, self.names)

    def read_union(self, root: Path, split: str) -> list[tuple[ImageList, _C]]:
        """The lists of a union of splits, without problems, and their classes."""
        parts: list[tuple[ImageList, _C]] = []
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
                Part(str(images.source), classes.names, [_name(image) for image, _ in images.pairs])
                for images, classes in parts
            ]
        )
        return parts

    def in_folder(self, place: DataFiles) -> Iterator[ImageList]:
        """All lists, with their problems."""
        for year in voc_files.voc_years(place.annotations):
            try:
                names = self.names(year)
            except ValueError:  # a bad classes.txt, reported for every list
                names = voc_files.list_names(year, self.folder)
            for name in names:
                images = self._list(year, name)
                with images.noting_errors():
                    classes = self.classes(year)
                    self.fill(images, year, classes)
                    self.note(images, classes)
                yield images

    def _list(self, year: Path, name: str) -> ImageList:
        path = year / f"ImageSets/{self.folder}/{name}.txt"
        return ImageList(f"{year.absolute().name}/{self.folder}/{name}", path)


def _mask_classes(year: Path) -> _MaskClasses:
    places = voc_files.class_folders(year)
    content = find_class_file(places)
    masks = [
        path
        for folder in ("SegmentationClass", "SegmentationClassAug")
        for path in sorted(matching(year / folder, "*.*"))
    ]
    file = places[-1] / "classes.txt" if content is None else content.file
    reader = choose_reader(masks, content, file=file, default=VOC_CLASSES)
    is_default = content is None and reader.classes == VOC_CLASSES
    return _MaskClasses(reader.classes, reader, is_default)


def _fill_masks(images: ImageList, year: Path, classes: _MaskClasses) -> None:
    images.classes, images.unit = classes.names, "pixels"
    images.pair_item = partial(LabelsItem, reader=classes.reader)
    images.may_be_official = classes.is_default
    if classes.reader.note:
        images.fault(classes.reader.note, file=year / "SegmentationClass", is_remark=True)
    folders = [Folder(year / "JPEGImages")], [Folder(year / "SegmentationClass")]
    if images.source.stem == "train_aug":
        folders[1].insert(0, Folder(year / "SegmentationClassAug"))
    for line in _require_lines(images.source):
        paths = [_inside(images, field.lstrip("/")) for field in line.split()]
        name = _inside(images, line.lstrip("/"))
        image = find_image_file("images", folders[0], name, ".jpg")
        if not isinstance(image, Path) and len(paths) == 2 and "/" in line:
            images.add(*map(_existing, ("images", "label maps"), (year / path for path in paths)))
        elif isinstance(image, Path) or len(paths) <= 2:
            if isinstance(image, Path):
                name = str(image.relative_to(folders[0][0].path).with_suffix(""))
            images.add(image, find_image_file("label maps", folders[1], name, ".png"))
        else:
            images.fault(f"expected an id or two paths per line, but got {line!r}")


def _inside(images: ImageList, name: str) -> str:
    try:
        return str(inside(name))
    except UserError as error:
        raise UserError(f"{images.source}: {error}") from error


def _name(image: Path) -> str:
    """Id of an image: its path in JPEGImages."""
    parts = image.with_suffix("").parts
    place = max((i for i, part in enumerate(parts) if part == "JPEGImages"), default=-2)
    return "__".join(parts[place + 1 :])


def _fill_boxes(images: ImageList, year: Path, classes: voc_files.ClassList) -> None:
    images.classes = classes.names
    images.pair_item = partial(BoxesItem, classes=classes)
    images.may_be_official = classes.is_official
    places = Folder(year / "JPEGImages"), Folder(year / "Annotations")
    seen: set[str] = set()
    for line in _require_lines(images.source):
        name, *rest = line.split()
        whole = _find_boxes(images, places, line)
        if rest and any(isinstance(file, Path) for file in whole):
            name, rest = line, []  # a name with blanks
        if rest not in ([], ["1"], ["0"], ["-1"]):
            images.fault(f"expected an id, or an id and 1, 0 or -1, per line, but got {line!r}")
        elif name in seen:
            images.fault(f"lists {name} more than once")
        else:
            seen.add(name)
            images.add(*(whole if name == line else _find_boxes(images, places, name)))


def _find_boxes(
    images: ImageList, places: tuple[Folder, Folder], name: str
) -> tuple[Path | Missing, Path | Missing]:
    """The image with a name, which may include a suffix and subfolders, and its XML file."""
    name = _inside(images, name)
    image = find_image_file("images", places[:1], name, ".jpg")
    if isinstance(image, Path):
        name = str(image.relative_to(places[0].path).with_suffix(""))
    folder = places[1].inner(Path(name).parent)
    xml = find_file("annotations", [folder], f"{Path(name).name}.xml")
    return image, xml


def _require_lines(path: Path) -> list[str]:
    """Lines of a list."""
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path}: expected image ids, but the list is empty")
    return lines


def _existing(kind: str, path: Path) -> Path | Missing:
    return path if path.is_file() else Missing(kind, (str(path.parent),), path.name)


_MASKS = _Lists(
    "Segmentation",
    lambda year: voc_files.list_names(year, "Segmentation"),
    _mask_classes,
    _fill_masks,
    lambda images, classes: note_void(images, classes.reader),
)
_BOXES = _Lists(
    "Main",
    voc_files.box_lists,
    voc_files.read_box_classes,
    _fill_boxes,
    lambda images, classes: None,
)


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
