"""A synthetic data set: shapes that differ by outline alone, in VOC layout or as image folder.

Every image has its own generator, seeded by (seed, split, number): the data set of 100 images is
the beginning of the one of 1000, and any part of it can be generated alone.
"""

import functools
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet._files import PARTIAL, encoding_png, locked_folder, remove_partial, write_file
from deformnet.data.synthetic.scenes import OBJECTS, Scene, Shapes, draw_scene, require
from deformnet.data.voc_files import color_map

SHAPE_CLASSES = ("background", *OBJECTS)

# To be increased when the same options draw other pixels, so that no data set mixes both.
_DRAWING = 1
_SETTINGS = "shapes.json"
_SPLITS = ("train", "val")
_TRIES = 100  # scenes that are drawn until an object is visible

# Thresholds of the flags in the annotations: visible pixels, and visible fractions.
_DIFFICULT_AREA = 40
_DIFFICULT_FRACTION = 0.5
_TRUNCATED_FRACTION = 0.95

_log = logging.getLogger(__name__)


def write_shapes(root: str | Path, options: Shapes) -> None:
    """Generates the data set in the folder `root`.

    ```
    root/classes.txt, shapes.json                   names from id 0; the options
    root/VOCdevkit/VOC2012/
      JPEGImages/<id>.jpg    Annotations/<id>.xml   boxes of visible pixels, 1-based as VOC's
      SegmentationClass/<id>.png    SegmentationObject/<id>.png
      ImageSets/{Segmentation,Main}/{train,val,trainval}.txt
    ```

    or, with the layout "image-folder"

    ```
    root/shapes.json
    root/{train,val}/<class>/<id>.jpg
    ```

    In the annotations, `truncated` marks objects of which the border or other objects hide more
    than 5 %, `difficult` those of which they hide half or which show fewer than 40 pixels.

    The data set is generated in `<root>.partial` and renamed when it is complete. If that folder
    exists from an interrupted run with the same options, the run resumes; with other options it
    starts again. A complete data set with the same options is left unchanged.

    Raises:
        FileExistsError: if `root` exists and is not such a data set.
        OSError: if a file cannot be written; the message names it.
    """
    root = Path(root).expanduser().absolute()
    settings = _settings_text(options)
    if root.is_dir() and _text_of(root / _SETTINGS) == settings:
        _log.info("%s exists already", root)
        return
    with _partial_folder(root, settings) as partial:
        _generate(partial, options, settings)
        partial.replace(root)


def _generate(partial: Path, options: Shapes, settings: str) -> None:
    _write(partial / _SETTINGS, settings.encode())
    counts = {"train": options.train, "val": options.val}
    folder, write = partial, _write_classified
    if options.layout == "voc":
        folder, write = partial / "VOCdevkit/VOC2012", _write_sample
        for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(counts.values()), desc="shapes", unit="image", disable=None) as bar:
        for split, count in counts.items():
            for number in range(count):
                write(folder, options, split, number)
                bar.update()
    if options.layout == "voc":
        _write_lists(folder, counts)
        _write(partial / "classes.txt", "".join(f"{name}\n" for name in SHAPE_CLASSES).encode())
    remove_partial(partial)


@contextmanager
def _partial_folder(root: Path, settings: str) -> Iterator[Path]:
    """The folder of an unfinished data set with these settings; refuses to overwrite others, and to
    write where another process does."""
    if root.exists() and not (root.is_dir() and next(root.iterdir(), None) is None):
        raise FileExistsError(
            f"{root}: exists and is not a data set of shapes with these options; choose another "
            "folder"
        )
    partial = root.with_name(f"{root.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked_folder(partial):
        _empty_of_others(partial, settings)
        yield partial


def _empty_of_others(partial: Path, settings: str) -> None:
    """Removes an unfinished data set with other settings from its folder."""
    if any(partial.iterdir()) and _text_of(partial / _SETTINGS) != settings:
        unfinished = all(path.name.endswith(PARTIAL) for path in partial.iterdir())
        if not unfinished and not (partial / _SETTINGS).is_file():
            raise FileExistsError(f"{partial}: exists and is not an unfinished data set of shapes")
        for path in list(partial.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def scene(options: Shapes, split: str, number: int) -> Scene:
    """The scene of one image, before it is encoded.

    Raises:
        UserError: if `split` is neither train nor val, or the objects are too small to be visible.
    """
    require(split in _SPLITS, "split", " or ".join(_SPLITS), split)
    rng = np.random.default_rng([options.seed, _SPLITS.index(split), number])
    classified = options.layout == "image-folder"
    for _ in range(_TRIES):
        drawn = draw_scene(rng, options, label=_label(number) if classified else None)
        if drawn.objects or not classified:
            return drawn
    raise UserError(
        f"expected radius to be large enough for a visible object, but got {options.radius}"
    )


def _write_sample(folder: Path, options: Shapes, split: str, number: int) -> None:
    name = _name(split, number)
    annotation = folder / f"Annotations/{name}.xml"
    if annotation.is_file():  # written last, so the others exist
        return
    drawn = scene(options, split, number)
    _write(folder / f"JPEGImages/{name}.jpg", _jpeg(drawn.image))
    _write(folder / f"SegmentationClass/{name}.png", _palette_png(drawn.labels))
    _write(folder / f"SegmentationObject/{name}.png", _palette_png(drawn.instances))
    _write(annotation, _annotation(name, drawn))


def _write_classified(folder: Path, options: Shapes, split: str, number: int) -> None:
    path = folder / split / SHAPE_CLASSES[_label(number)] / f"{_name(split, number)}.jpg"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, _jpeg(scene(options, split, number).image))


def _label(number: int) -> int:
    """Class of an image of an image folder: each in turn."""
    return 1 + number % len(OBJECTS)


def _settings_text(options: Shapes) -> str:
    values = {"drawing": _DRAWING, **asdict(options)}
    if options.layout == "voc":  # as before there was another layout
        del values["layout"]
    return json.dumps(values, indent=2) + "\n"


def _write_lists(folder: Path, counts: dict[str, int]) -> None:
    names = {s: [_name(s, number) for number in range(count)] for s, count in counts.items()}
    names["trainval"] = names["train"] + names["val"]
    for task in ("Segmentation", "Main"):
        lists = folder / "ImageSets" / task
        lists.mkdir(parents=True, exist_ok=True)
        for split, ids in names.items():
            _write(lists / f"{split}.txt", "".join(f"{name}\n" for name in ids).encode())


def _name(split: str, number: int) -> str:
    return f"{split}_{number:06d}"


def _jpeg(image: np.ndarray) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=92, subsampling=0)
    return jpeg.getvalue()


def _palette_png(labels: np.ndarray) -> bytes:
    image = Image.fromarray(labels)
    image.putpalette(color_map().tobytes())
    png = io.BytesIO()
    with encoding_png():
        image.save(png, "PNG")
    return png.getvalue()


def _annotation(name: str, drawn: Scene) -> bytes:
    height, width, depth = drawn.image.shape
    size = {"width": width, "height": height, "depth": depth}
    root = ElementTree.Element("annotation")
    _add(root, {"folder": "VOC2012", "filename": f"{name}.jpg"})
    _add(root, {"source": {"database": "deformnet shapes"}, "size": size, "segmented": 1})
    for item in drawn.objects:
        visible = item.area / item.full_area
        difficult = visible < _DIFFICULT_FRACTION or item.area < _DIFFICULT_AREA
        # VOC counts pixels from 1 and includes both ends.
        x1, y1, x2, y2 = item.box
        content = {
            "name": SHAPE_CLASSES[item.label],
            "pose": "Unspecified",
            "truncated": int(visible < _TRUNCATED_FRACTION),
            "difficult": int(difficult),
            "bndbox": {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2},
        }
        _add(root, {"object": content})
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, children: Mapping[str, object]) -> None:
    for tag, content in children.items():
        element = ElementTree.SubElement(parent, tag)
        if isinstance(content, Mapping):
            _add(element, content)
        else:
            element.text = str(content)


# Without waiting for the disk, which is slow for many files.
_write = functools.partial(write_file, durable=False)


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
