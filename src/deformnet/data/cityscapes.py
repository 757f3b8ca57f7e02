"""Cityscapes' layout for semantic segmentation (Cordts et al. 2016)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import final

import torch
from torchvision.datasets import Cityscapes

from deformnet.data.base import IGNORE, LabeledImage, SegmentationDataset
from deformnet.data.files import listing, require_folder
from deformnet.data.items import LabelsItem
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.splits import Part, require_union, split_parts

# id -> train id of the 34 stored ids; license plates (-1) have no 8-bit id. From torchvision's copy
# of the official table.
_TRAIN_ID = {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0}
CITYSCAPES_CLASSES = tuple(c.name for c in Cityscapes.classes if c.train_id not in (-1, IGNORE))

_IMAGE, _LABELS = "_leftImg8bit.png", "_gtFine_labelIds.png"
_EMPTY = f"expected images, but found no <city>/*{_IMAGE}"

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
class CityscapesSegmentation(SegmentationDataset):
    """Images and fine labels in the Cityscapes layout.

    ```
    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png
    ```

    A split is a folder, or several joined by `+` (`train+val`).

    Only these two kinds of files are read. Of the 34 stored ids, 19 become the train ids and the
    others void. (torchvision's reader of this layout knows three fixed splits, takes files in the
    order of the disk, finds missing ones only when it reads them, and returns the stored ids.)
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, split (the message says which exist) or label
                file.
            UserError: if the split has no images, or two parts share the name of an image.
        """
        root = require_folder(Path(root).expanduser())
        samples: list[LabeledImage] = []
        parts: list[Part] = []
        for name in split_parts(split):
            images = _find_images(root, name)
            if not images.source.is_dir():
                splits = listing(cityscapes_splits(root))
                raise FileNotFoundError(
                    f"{images.source}: no such folder; the splits in {root} are: {splits}"
                )
            require_folder(root / "gtFine" / name)
            if not images.entries:
                images.fault(_EMPTY)
            images.require()
            added = [
                LabeledImage(image.name.removesuffix(_IMAGE), image, labels)
                for image, labels in images.pairs
            ]
            samples += added
            parts.append(Part(str(images.source), (), [sample.name for sample in added]))
        require_union(parts)
        label_map = torch.full((256,), _UNKNOWN, dtype=torch.uint8)
        for label, train_id in _TRAIN_ID.items():
            label_map[label] = train_id
        label_map[IGNORE] = IGNORE
        super().__init__(root, split, samples, CITYSCAPES_CLASSES, transforms, label_map=label_map)

    def _wrong_label(self, path: Path, label: int) -> str:
        return (
            f"{path}: expected the ids of Cityscapes, 0 to {max(_TRAIN_ID)}, but got label {label}"
        )


def cityscapes_splits(root: Path) -> list[str]:
    """Splits with a folder of images."""
    return sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir())


def _find_images(root: Path, split: str) -> ImageList:
    """The images of a split, with their label maps."""
    images = ImageList(f"gtFine/{split}", root / "leftImg8bit" / split)
    labels = root / "gtFine" / split
    images.pair_item = partial(LabelsItem, allowed=bytes([*_TRAIN_ID, IGNORE]))
    existing = set(labels.glob(f"*/*{_LABELS}"))
    for image in sorted(images.source.glob(f"*/*{_IMAGE}")):
        images.may_be_official |= image.parent.name in _CITIES.split()
        name = f"{image.parent.name}/{image.name.removesuffix(_IMAGE)}{_LABELS}"
        path = labels / name
        images.add(image, path if path in existing else Missing("label maps", (str(labels),), name))
    return images


def _lists(root: Path) -> Iterator[ImageList]:
    folders = (path for kind in ("leftImg8bit", "gtFine") for path in (root / kind).glob("*"))
    for split in sorted({path.name for path in folders if path.is_dir()}):
        images = _find_images(root, split)
        labels = root / "gtFine" / split
        # A reader does not need the images of other label maps.
        for path in sorted({*labels.glob(f"*/*{_LABELS}")} - {path for _, path in images.pairs}):
            name = f"{path.parent.name}/{path.name.removesuffix(_LABELS)}{_IMAGE}"
            images.add(Missing("images", (str(images.source),), name), path)
        if not images.entries:
            images.fault(_EMPTY)
        yield images


CITYSCAPES_MASKS = Layout[SegmentationDataset](
    name="Cityscapes",
    files="leftImg8bit/ and gtFine/",
    recognizes=lambda root: (root / "leftImg8bit").is_dir() or (root / "gtFine").is_dir(),
    splits=cityscapes_splits,
    lists=_lists,
    open=CityscapesSegmentation,
)
