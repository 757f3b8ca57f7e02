"""Folders of images and VOC XML files without image lists: labelImg, Roboflow, CVAT."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, final

from deformnet._errors import UserError
from deformnet._files import naming
from deformnet.data import voc_files
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import (
    Orientation,
    find_images,
    has_images,
    image_names,
    is_image,
    listing,
    log_once,
    read_size,
    subfolders,
    walk_files,
)
from deformnet.data.items import BoxesItem, ImageItem
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.splits import Part, is_usual, require_union, resolve, split_parts
from deformnet.data.voc import add_objects
from deformnet.data.voc_files import ClassList

_XML_FOLDERS = ("annotations", "annotation", "labels", "label", "xml", "xmls", "ann")
_IMAGE_FOLDERS = ("images", "image", "jpegimages", "imgs", "img", "photos", "data")
_PEEKED = 3  # number of XML files to inspect to recognize the layout


@final
class VOCFolderDetection(DetectionDataset):
    """Images and boxes in VOC XML files, in folders without image lists:

    ```
    classes.txt                            optional
    <any name>.jpg, <any name>.xml         in one folder
    images/, annotations/                  or in two
    <split>/                               the same in a folder for each split, or
    images/<split>/, annotations/<split>/
    ```

    Without splits, all images are `train`. Folders may also be called JPEGImages, Annotations,
    labels and so on; subfolders are included. An image without an XML file has no objects; the
    number of such images is logged. See `VOCDetection` for boxes and classes; without classes.txt,
    however, the classes are always the sorted names of the objects in all splits.
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
            FileNotFoundError: if a folder, a split (the message lists those that exist) or the
                image of an XML file is missing.
            UserError: if an XML file or classes.txt is malformed, an object has an unknown class,
                or the parts of a union share an image.
        """
        place = locate(root)
        splits = find_folders(place)
        classes = read_classes(place, splits)
        files: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        parts: list[Part] = []
        for name in split_parts(split):
            part = resolve(list(splits), name)
            if part not in splits:
                known = listing(list(splits))
                raise FileNotFoundError(f"{place}: no split {name!r}; the splits are: {known}")
            images = _fill(part, splits[part], classes)
            images.require()
            rows: list[tuple[Path, Path | None]] = [
                *images.pairs,
                *((Path(item.image), None) for item in images.singles),
            ]
            rows.sort(key=lambda row: row[0])
            names = image_names([image.relative_to(splits[part].images) for image, _ in rows])
            for image_name, (image, xml) in zip(names, rows, strict=True):
                size = None if xml is None else add_objects(objects, len(files), xml, classes)
                size = size or read_size(image, orientation=orientation)
                file = str(image.relative_to(place.images))
                files.append(ImageFile(image_name, file, size))
            parts.append(Part(str(images.source), classes.names, names))
            if images.singles:
                log_once(
                    logging.INFO,
                    f"{images.source}: {len(images.singles)} of {len(rows)} images have no XML "
                    "file; they are read without objects",
                )
        require_union(parts)
        super().__init__(
            *(place.annotations, split, place.images, files, objects, classes.names, transforms),
            orientation=orientation,
        )


class XMLFolders(NamedTuple):
    """Folders of a split; they may be the same."""

    images: Path
    annotations: Path


def find_folders(place: DataFiles) -> dict[str, XMLFolders]:
    """Folders of each split, possibly none."""
    root = place.annotations
    if place.are_apart:
        return {"train": XMLFolders(place.images, root)} if _holds_xml(root) else {}
    inner = {path.name: path for path in subfolders(root)}
    if _has_xml(root):
        return {"train": XMLFolders(root, root)}
    pair = _pair(root)
    if pair is not None:
        return _splits_inside(pair) or {"train": pair}
    alone = {
        name: XMLFolders(path, path)
        for name, path in inner.items()
        if name.lower() not in _XML_FOLDERS and _has_xml(path)
    }
    pairs = {name: pair for name, path in inner.items() if (pair := _pair(path))}
    found = {name: folders for name, folders in {**pairs, **alone}.items() if is_usual(name)}
    if found:
        return dict(sorted(found.items()))
    return {"train": XMLFolders(root, root)} if alone else {}


def _pair(root: Path) -> XMLFolders | None:
    """A folder of images, or `root` itself, and a folder of XML files."""
    folders = {path.name.lower(): path for path in subfolders(root)}
    xml = next(
        (folders[name] for name in _XML_FOLDERS if name in folders and _holds_xml(folders[name])),
        None,
    )
    if xml is None:
        return None
    with_images = (folders[name] for name in _IMAGE_FOLDERS if name in folders)
    return XMLFolders(next(filter(has_images, with_images), root), xml)


def _splits_inside(pair: XMLFolders) -> dict[str, XMLFolders]:
    """Splits that are subfolders of the image and annotation folders."""
    folders = {path.name: path for path in subfolders(pair.annotations) if is_usual(path.name)}
    images = {path.name.lower(): path for path in subfolders(pair.images)}
    return {
        name: XMLFolders(images[name.lower()], path)
        for name, path in folders.items()
        if name.lower() in images and _has_xml(path)
    }


def _has_xml(folder: Path) -> bool:
    """Whether the first XML files directly in a folder are VOC files."""
    with os.scandir(folder) as entries:
        files = [folder / entry.name for entry in entries if is_xml(entry.name)]
    return any(map(_is_voc, sorted(files)[:_PEEKED]))


def _holds_xml(folder: Path) -> bool:
    """Whether the first XML files in a folder or its subfolders are VOC files."""
    if not folder.is_dir():
        return False
    files = (
        Path(place, name) for place, names in walk_files(folder, is_xml) for name in names[:_PEEKED]
    )
    return any(map(_is_voc, islice(files, _PEEKED)))


def is_xml(name: str) -> bool:
    """Whether a file name is that of a visible XML file."""
    return name.lower().endswith(".xml") and not name.startswith(".")


def _is_voc(path: Path) -> bool:
    """Whether a file looks like a VOC annotation, or is damaged."""
    if not path.is_file():
        return False
    with naming(path), path.open("rb") as file:
        start = file.read(4096)
    # CVAT's own files have <annotations>.
    return re.search(rb"<annotation[\s>]", start) is not None or b"\0" in start


def read_classes(place: DataFiles, splits: Mapping[str, XMLFolders]) -> ClassList:
    """Classes in classes.txt or, without it, the sorted names of the objects of all splits.

    Raises:
        UserError: if there are none.
    """
    inside = (path for folders in splits.values() for path in folders)
    listed = voc_files.read_class_file(dict.fromkeys([place.annotations, *inside]))
    if listed is not None:
        return listed
    files = (path for folders in splits.values() for path in _xml_files(folders.annotations))
    names = voc_files.object_names(files)
    if not names:
        raise UserError(f"{place}: expected named objects, but found none in its XML files")
    return ClassList(tuple(names), place.annotations / "classes.txt", is_default=True)


def _xml_files(folder: Path) -> list[Path]:
    walked = walk_files(folder, is_xml)
    return sorted(Path(place, name) for place, names in walked for name in names)


def _fill(name: str, folders: XMLFolders, classes: ClassList) -> ImageList:
    """The images of a split with their XML files."""
    images = ImageList(name, folders.annotations, classes=classes.names)
    images.pair_item = partial(BoxesItem, classes=classes)
    files = find_images(folders.images)
    finder = _ImageFinder(folders.images, files)
    owners: dict[Path, Path] = {}
    for xml in _xml_files(folders.annotations):
        image = finder(xml.relative_to(folders.annotations)) or finder.stored(xml)
        if image is None:
            missing = Missing("images", (str(folders.images),), f"{xml.stem}.jpg")
            images.add(missing, xml)
        elif image in owners:
            images.fault(f"image {image.name} is also annotated by {owners[image].name}", file=xml)
        else:
            owners[image] = xml
            images.add(image, xml)
    bare = [file for file in files if file not in owners]
    images.singles += [ImageItem(str(file), None) for file in bare]
    images.entries += len(bare)
    if not images.entries:
        images.fault("expected images with XML files, but found none")
    elif bare:
        text = f"{len(bare)} images have no XML file; they are read without objects"
        images.fault(text, is_remark=True)
    return images


class _ImageFinder:
    """Finds the image of an XML file: by its path, or by its name in any subfolder."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        paths = {file.relative_to(folder): file for file in reversed(files)}
        self._by_path = {path.with_suffix(""): file for path, file in paths.items()} | paths
        self._by_name: dict[str, list[Path]] = {}
        for file in files:
            self._by_name.setdefault(file.stem, []).append(file)
            self._by_name.setdefault(file.name, []).append(file)

    def __call__(self, xml: Path) -> Path | None:
        return self._by_path.get(xml.with_suffix("")) or self._unique(xml.stem)

    def stored(self, xml: Path) -> Path | None:
        """The image with the name stored in the XML file, for files that were renamed."""
        try:
            name = voc_files.parse_annotation(xml).findtext("filename", "").strip()
        except UserError:
            return None
        name = name.replace("\\", "/").rpartition("/")[2]
        return self._unique(name) if is_image(name) else None

    def _unique(self, name: str) -> Path | None:
        files = self._by_name.get(name, [])
        return files[0] if len(files) == 1 else None


def _lists(place: DataFiles) -> Iterator[ImageList]:
    splits = find_folders(place)
    for name, folders in splits.items():
        failed = ImageList(name, folders.annotations)
        with failed.noting_errors():
            yield _fill(name, folders, read_classes(place, splits))
        if failed.faults:
            yield failed


def _recognizes(root: Path) -> bool:
    return not voc_files.voc_years(root) and bool(find_folders(DataFiles(root, root)))


VOC_FOLDERS = Layout[DetectionDataset](
    name="VOC's XML",
    files="images and <image>.xml",
    recognizes=_recognizes,
    splits=lambda root: list(find_folders(DataFiles(root, root))),
    lists=_lists,
    open=VOCFolderDetection,
    recognizes_files=lambda files: bool(find_folders(files)),
)
