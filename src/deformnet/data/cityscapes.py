"""Cityscapes' layout for semantic segmentation (Cordts et al. 2016)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import final

from torchvision.datasets import Cityscapes

from deformnet._files import matching
from deformnet.data.base import IGNORE, LabeledImage, MaskFileDataset, SegmentationDataset
from deformnet.data.files import Orientation, is_image, listing, require_folder
from deformnet.data.items import LabelsItem
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.mask_reader import MaskReader, choose_reader, note_void
from deformnet.data.palette import find_class_file
from deformnet.data.splits import Part, require_union, resolve, split_parts

# id -> train id of the 34 stored ids; license plates (-1) have no 8-bit id. From torchvision's copy
# of the official table.
_TRAIN_ID = {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0}
CITYSCAPES_CLASSES = tuple(c.name for c in Cityscapes.classes if c.train_id not in (-1, IGNORE))

_IMAGE, _LABELS = "_leftImg8bit", "_gtFine_labelIds.png"
_EMPTY = f"expected images, but found no <city>/*{_IMAGE}.png"

# Stored labels outside the table: neither class nor void, so reading one is an error.
_UNKNOWN = 254

# Cities of train, val and test. A data set in this layout without any of them is custom.
_CITIES = """
    aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena krefeld
    monchengladbach strasbourg stuttgart tubingen ulm weimar zurich
    frankfurt lindau munster
    berlin bielefeld bonn leverkusen mainz munich
"""


@final
class CityscapesSegmentation(MaskFileDataset):
    """Images and fine labels in the Cityscapes layout.

    ```
    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png
    ```

    Images may have any image suffix. A split is a folder, or several joined by `+` (`train+val`).

    Only these two kinds of files are read. Of the 34 stored ids, 19 are mapped to train ids and the
    others to void. With a `classes.txt` in the same folder, ids are its line numbers, starting at
    0. (torchvision's reader supports three fixed splits, lists files in the order of the disk,
    reports missing files only when it reads them, and returns the stored ids.)
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
            FileNotFoundError: for a missing folder, split (the message says which exist) or label
                file.
            UserError: if the split has no images, or two parts share the name of an image.
        """
        root = locate(root).annotations
        reader = _reader(root)
        splits = cityscapes_splits(root)
        samples: list[LabeledImage] = []
        parts: list[Part] = []
        for name in split_parts(split):
            images = _find_images(root, resolve(splits, name), reader)
            if not images.source.is_dir():
                raise FileNotFoundError(
                    f"{images.source}: no such folder; the splits in {root} are: {listing(splits)}"
                )
            require_folder(root / "gtFine" / images.source.name)
            if not images.entries:
                images.fault(_EMPTY)
            images.require()
            added = [
                LabeledImage(image.stem.removesuffix(_IMAGE), image, labels)
                for image, labels in images.pairs
            ]
            samples += added
            parts.append(Part(str(images.source), (), [sample.name for sample in added]))
        require_union(parts)
        super().__init__(root, split, samples, reader, transforms, orientation)


def _reader(root: Path) -> MaskReader:
    """Reader of the ids of Cityscapes, or of the ids in a class file."""
    content = find_class_file([root])
    if content is not None:
        masks = sorted(matching(root / "gtFine", f"*/*/*{_LABELS}"))
        return choose_reader(masks, content, file=content.file)
    table = bytearray([_UNKNOWN] * 256)
    for label, train_id in _TRAIN_ID.items():
        table[label] = train_id
    table[IGNORE] = IGNORE
    own = f"for custom ids, write the class names, one per line, to {root}"
    return MaskReader(
        CITYSCAPES_CLASSES,
        f"the ids of Cityscapes, 0 to {max(_TRAIN_ID)}",
        f"{own}/classes.txt",
        bytes(table),
        void_advice=f"ids such as 0 to 6 are void in Cityscapes; {own}/classes.txt",
    )


def cityscapes_splits(root: Path) -> list[str]:
    """Splits with a folder of images."""
    return sorted(path.name for path in matching(root / "leftImg8bit", "*/"))


def _find_images(root: Path, split: str, reader: MaskReader) -> ImageList:
    """The images of a split, with their label maps."""
    images = ImageList(f"gtFine/{split}", root / "leftImg8bit" / split)
    labels = root / "gtFine" / split
    images.classes, images.unit = reader.classes, "pixels"
    images.pair_item = partial(LabelsItem, reader=reader)
    existing = set(matching(labels, f"*/*{_LABELS}"))
    for image in sorted(filter(_is_image, matching(images.source, "*/*"))):
        images.may_be_official |= image.parent.name in _CITIES.split()
        name = f"{image.parent.name}/{image.stem.removesuffix(_IMAGE)}{_LABELS}"
        path = labels / name
        images.add(image, path if path in existing else Missing("label maps", (str(labels),), name))
    return images


def _is_image(path: Path) -> bool:
    return path.stem.endswith(_IMAGE) and is_image(path.name)


def _lists(place: DataFiles) -> Iterator[ImageList]:
    root = place.annotations
    reader = _reader(root)
    folders = (path for kind in ("leftImg8bit", "gtFine") for path in matching(root / kind, "*/"))
    for split in sorted({path.name for path in folders}):
        images = _find_images(root, split, reader)
        labels = root / "gtFine" / split
        # A reader does not need the images of other label maps.
        for path in sorted(
            {*matching(labels, f"*/*{_LABELS}")} - {path for _, path in images.pairs}
        ):
            name = f"{path.parent.name}/{path.name.removesuffix(_LABELS)}{_IMAGE}.png"
            images.add(Missing("images", (str(images.source),), name), path)
        if not images.entries:
            images.fault(_EMPTY)
        # The published labels of the test set are all void.
        note_void(images, reader, is_remark=split == "test")
        yield images


CITYSCAPES_MASKS = Layout[SegmentationDataset](
    name="Cityscapes",
    files="leftImg8bit/ and gtFine/",
    recognizes=lambda root: (root / "leftImg8bit").is_dir() or (root / "gtFine").is_dir(),
    splits=cityscapes_splits,
    lists=_lists,
    open=CityscapesSegmentation,
)
