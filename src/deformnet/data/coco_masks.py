"""COCO's layout for semantic segmentation: polygons and RLE, drawn when an image is read."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, final

import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import mapped
from deformnet.data import coco
from deformnet.data.base import IGNORE, LabeledImage, SegmentationDataset
from deformnet.data.files import Orientation, Size, size_text
from deformnet.data.flat import BytesList, span
from deformnet.data.layouts import ImageList, Layout
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.polygons import Region, draw, pack, unpack, with_background
from deformnet.data.splits import Part, require_union, split_parts

# Polygons or RLE; data sets with only boxes have an empty list.
_SIGN = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[|\{)')


@final
class COCOSegmentation(SegmentationDataset):
    """Images in the COCO layout with label maps drawn from the segmentations of their objects.

    See `COCODetection` for the files. Label 0 is the background; the categories follow from 1, in
    the order of their ids. Objects are drawn in the order of the file, later objects over earlier
    ones; crowds are void.

    Segmentations are kept in flat tensors: COCO's train2017 takes 0.2 GB, shared by all workers.
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
            FileNotFoundError: see `COCODetection`.
            UserError: see `COCODetection`; also if a segmentation is malformed or missing, or if
                there are more classes than a mask can hold.
        """
        place = locate(root)
        samples: list[LabeledImage] = []
        owners: list[int] = []
        values: list[int] = []
        segmentations: list[bytes] = []
        parts: list[Part] = []
        sizes: list[Size | None] = []
        classes: tuple[str, ...] = ()
        for name in split_parts(split):
            part = coco.find_split(place, name)
            file = coco.COCOFile(part.file, _pack_segmentation)
            if not file.has_annotations:
                raise UserError(f"{file.path}: expected annotations, but found only images")
            classes = with_background(file.classes, file.path)
            first = len(classes) - len(file.classes)
            for entry in file.annotations:
                index, _, label, crowd = file.parse(entry)
                owners.append(len(samples) + index)
                values.append(IGNORE if crowd else first + label)
                segmentations.append(_segmentation(file.path, entry))
            found = ImageList(name, file.path)
            coco.add_images(found, file, part)
            found.require()
            names = coco.image_names(file.files)
            sizes += file.sizes
            samples += [
                LabeledImage(image_name, Path(item.image), file.path)
                for image_name, item in zip(names, found.singles, strict=True)
            ]
            parts.append(Part(str(file.path), file.classes, names))
        require_union(parts)
        super().__init__(place.annotations, split, samples, classes, transforms, orientation)
        self._sizes = torch.tensor([size or (0, 0) for size in sizes], dtype=torch.int64)
        order = torch.tensor(owners, dtype=torch.int64).argsort(stable=True)
        self._values = torch.tensor(values, dtype=torch.uint8)[order]
        self._segmentations = BytesList(segmentations[i] for i in order.tolist())
        counts = torch.bincount(torch.tensor(owners, dtype=torch.int64), minlength=len(samples))
        self._ends = counts.cumsum(0)

    def subset(self, indices: Sequence[int], split: str) -> Self:
        part = super().subset(indices, split)
        part._sizes = self._sizes[list(indices)]
        spans = [range(len(self._values))[span(self._ends, index)] for index in indices]
        objects = [item for objects in spans for item in objects]
        part._values = self._values[objects]
        part._segmentations = BytesList(self._segmentations[item] for item in objects)
        part._ends = torch.tensor([len(objects) for objects in spans], dtype=torch.int64).cumsum(0)
        return part

    def annotated_size(self, index: int) -> Size | None:
        height, width = self._sizes[index].tolist()
        return (height, width) if height else None

    def labels(self, index: int, size: Size) -> Tensor:
        self._require_size(index, size, self.annotated_size(index))
        objects = range(len(self._values))[span(self._ends, index)]
        return draw(size, [self._region(index, item, size) for item in objects])

    def _region(self, index: int, item: int, size: Size) -> Region:
        region = unpack(self._segmentations[item], int(self._values[item]), size)
        if region is None:
            raise UserError(
                f"{self.samples[index].labels}: image {self.name(index)}: expected RLE of the "
                f"image size, {size_text(*size)}, but got RLE of another size"
            )
        return region


def _pack_segmentation(entry: dict[str, object]) -> dict[str, object]:
    if "segmentation" in entry:
        entry["segmentation"] = pack(entry["segmentation"])
    return entry


def _segmentation(path: Path, entry: coco.Entry) -> bytes:
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, bytes) and len(segmentation) > 1:
        return segmentation
    raise UserError(
        f"{path}: annotation {entry.get('id')}: expected segmentation to be polygons of at least 3 "
        "points x, y, or RLE (run lengths), but got none or something else"
    )


def _has_segmentations(root: Path) -> bool:
    splits = coco.find_splits(DataFiles(root, root)).values()
    return any(_SIGN.search(mapped(split.file)) for split in splits)


def _lists(place: DataFiles) -> Iterator[ImageList]:
    for split in coco.find_splits(place).values():
        path = split.file
        images = ImageList(f"{path.stem} (masks)", path)
        with images.noting_errors():
            content = coco.COCOFile(path, _pack_segmentation)
            if not content.has_annotations:
                continue
            with_background(content.classes, path)
            coco.add_images(images, content, split)
            for entry in content.annotations:
                with images.noting_errors():
                    _segmentation(path, entry)
        yield images


COCO_MASKS = Layout[SegmentationDataset](
    name="COCO with polygons",
    files=coco.FILES,
    recognizes=_has_segmentations,
    splits=coco.coco_splits,
    lists=_lists,
    open=COCOSegmentation,
    recognizes_files=lambda files: (
        coco.COCO_BOXES.recognizes_files(files)
        and any(_SIGN.search(mapped(it.file)) for it in coco.find_splits(files).values())
    ),
)
