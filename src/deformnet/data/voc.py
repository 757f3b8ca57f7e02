"""PASCAL VOC's layout for semantic segmentation and detection (Everingham et al. 2010)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from deformnet._errors import UserError
from deformnet.data import voc_files
from deformnet.data.base import LabeledImage, SegmentationDataset
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import Folder, read_size
from deformnet.data.layouts import Layout
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
        samples: list[LabeledImage] = []
        parts: list[Part] = []
        classes: list[voc_files.ClassList] = []
        for year, name in voc_files.find_lists(root, split):
            path = year / "ImageSets/Segmentation" / f"{name}.txt"
            added = list(_read_masks(year, path, _mask_splits(root)))
            classes.append(voc_files.read_mask_classes(year))
            parts.append(Part(str(path), classes[-1].names, [sample.name for sample in added]))
            samples += added
        require_union(parts)
        super().__init__(
            *(root, samples, classes[0].names, transforms), classes_from=f" {classes[0].origin}"
        )
        self.split = split
        self._advice = classes[0].advice

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

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
        images: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        parts: list[Part] = []
        lists = voc_files.find_lists(root, split)
        for year, name in lists:
            path = year / "ImageSets/Main" / f"{name}.txt"
            classes = voc_files.read_box_classes(year)
            added, their_objects = _read_boxes(year, path, classes, _box_splits(root))
            parts.append(Part(str(path), classes.names, [image.name for image in added]))
            objects.extend(their_objects, len(images))
            images += added
        require_union(parts)
        years = lists[0][0].parent  # all are in one folder
        super().__init__(root, years, images, objects, parts[0].classes, transforms)
        self.split = split

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def _is_voc(root: Path) -> bool:
    return bool(voc_files.voc_years(root))


def _mask_splits(root: Path) -> list[str]:
    return voc_files.splits_of_years(root, voc_files.mask_lists)


def _box_splits(root: Path) -> list[str]:
    return voc_files.splits_of_years(root, voc_files.box_lists)


VOC_MASKS = Layout[SegmentationDataset](
    "VOC", voc_files.YEARS, _is_voc, _mask_splits, VOCSegmentation
)
VOC_BOXES = Layout[DetectionDataset]("VOC", voc_files.YEARS, _is_voc, _box_splits, VOCDetection)


def _read_masks(year: Path, path: Path, splits: list[str]) -> Iterator[LabeledImage]:
    find = voc_files.MaskFinder(year, path.stem)
    for fields in voc_files.read_fields(path, splits):
        if not voc_files.MASK_LINE.fits(fields):
            raise UserError(f"{path}: {voc_files.MASK_LINE.error(fields)}")
        name, image, mask = find(fields)
        if image is None:
            folder = find.images.folder.path
            raise FileNotFoundError(f"{path}: lists {fields[0]}, which is not in {folder}")
        if mask is None:
            places = " or ".join(str(place.path) for place in find.masks)
            raise FileNotFoundError(f"{path}: lists {fields[-1]}, which has no mask in {places}")
        yield LabeledImage(name, image, mask)


def _read_boxes(
    year: Path, path: Path, classes: voc_files.ClassList, splits: list[str]
) -> tuple[list[ImageFile], ObjectList]:
    """Images of a list, with paths relative to the parent of `year`, and their objects."""
    find, annotations = voc_files.ImageFinder(year), Folder(year / "Annotations")
    images: dict[str, ImageFile] = {}
    objects = ObjectList([], [], [], [])
    for fields in voc_files.read_fields(path, splits):
        name = fields[0]
        if not voc_files.BOX_LINE.fits(fields):
            raise UserError(f"{path}: {voc_files.BOX_LINE.error(fields)}")
        if name in images:
            raise UserError(f"{path}: lists {name} more than once")
        image, xml = find(name), annotations.find(f"{name}.xml")
        if image is None:
            raise FileNotFoundError(f"{path}: lists {name}, which is not in {find.folder.path}")
        if xml is None:
            raise FileNotFoundError(
                f"{path}: lists {name}, which has no {name}.xml in {annotations.path}"
            )
        content = voc_files.parse_annotation(xml)
        for item in content.iterfind("object"):
            objects.add(len(images), *voc_files.read_object(xml, item, classes))
        size = voc_files.annotated_size(content) or read_size(image)
        # The folder of a year given as "." has no name, and is its own parent.
        images[name] = ImageFile(name, str(Path(year.name, "JPEGImages", image.name)), size)
    return list(images.values()), objects
