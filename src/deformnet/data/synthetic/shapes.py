"""A made data set: shapes to be told apart by outline alone, in the VOC layout or by class.

Every image is drawn from its own generator, seeded by (seed, split, number): the set of 100 images
is the beginning of the set of 1000, and any part of it can be made anywhere.
"""

import io
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from deformnet.data.synthetic.scenes import OBJECTS, Scene, draw_scene
from deformnet.data.voc import color_map

SHAPE_CLASSES = ("background", *OBJECTS)

# To be raised whenever the same settings draw other pixels, so that no set mixes both.
_DRAWING = 1
_SETTINGS = "shapes.json"
_SPLITS = ("train", "val")
_TRIES = 100  # scenes that are drawn until an object shows

# An object that shows fewer pixels, or less of itself, is marked as difficult.
_DIFFICULT_AREA = 40
_DIFFICULT_SHARE = 0.5
_TRUNCATED_SHARE = 0.95

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shapes:
    """Which set to make.

    Attributes:
        train: images in the split `train`.
        val: images in the split `val`.
        height: of an image, in pixels.
        width: of an image, in pixels.
        warp: strength of the smooth non-rigid deformation, 0 (none) to 1.
        seed: of the generator; the same settings give the same bytes (with the same versions of
            NumPy and Pillow on the same kind of processor).
        objects: fewest and most objects in an image.
        radius: smallest and largest distance from an object's centre to its farthest point, before
            deformation, as a share of the shorter side; drawn log-uniformly.
        clutter: most shapes of no class that lie behind the objects.
        mute: how far all behind the objects is drawn towards one dark grey: 0 leaves it as vivid
            as the objects, 1 makes it plain, so that only their class is to be learned.
        void_border: pixels along the outlines that are labelled 255, as in VOC; 0 for exact masks.
        layout: label maps and boxes as VOC's; or images of one object each (whatever `objects`
            says), as many of every class, in a folder of their class, for classification.
    """

    train: int = 2500
    val: int = 300
    height: int = 160
    width: int = 160
    warp: float = 0.5
    seed: int = 0
    objects: tuple[int, int] = (1, 3)
    radius: tuple[float, float] = (0.055, 0.45)
    clutter: int = 3
    mute: float = 0.0
    void_border: int = 0
    layout: Literal["voc", "image-folder"] = "voc"

    def __post_init__(self) -> None:
        for name in ("train", "val"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("height", "width"):
            _require(getattr(self, name) >= 16, name, "at least 16", getattr(self, name))
        for name in ("seed", "clutter", "void_border"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("warp", "mute"):
            _require(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        fewest, most = self.objects
        _require(1 <= fewest <= most <= 254, "objects", "1 <= fewest <= most <= 254", self.objects)
        smallest, largest = self.radius
        in_order = 0 < smallest <= largest <= 0.5
        _require(in_order, "radius", "0 < smallest <= largest <= 0.5", self.radius)
        if self.layout == "image-folder":
            wanted = f"at least {len(OBJECTS)} in an image folder, one of each class"
            _require(self.train >= len(OBJECTS), "train", wanted, self.train)
        else:
            _require(self.layout == "voc", "layout", "voc or image-folder", self.layout)


def write_shapes(root: Path, shapes: Shapes) -> None:
    """Makes the set in the folder `root`.

    ```
    root/classes.txt, shapes.json                   names from id 0; the settings
    root/VOCdevkit/VOC2012/
      JPEGImages/<id>.jpg    Annotations/<id>.xml   boxes of what shows, 1-based as VOC's
      SegmentationClass/<id>.png    SegmentationObject/<id>.png
      ImageSets/{Segmentation,Main}/{train,val,trainval}.txt
    ```

    or, in the layout "image-folder"

    ```
    root/shapes.json
    root/{train,val}/<class>/<id>.jpg
    ```

    In the boxes' files, `truncated` marks objects of which the border or another object hides more
    than 5 %, `difficult` those of which it hides half or which show fewer than 40 pixels.

    The set is made in `<root>.partial` and renamed when it is whole. If that folder is there from
    an interrupted run with the same settings, the work goes on where it stopped; one with other
    settings is begun again. A whole set with the same settings is left as it is.

    Raises:
        FileExistsError: if `root` is there and is not such a set.
        OSError: if a file cannot be written; the message names it.
    """
    root = Path(root).expanduser().absolute()
    settings = _settings_text(shapes)
    if root.is_dir() and _text_of(root / _SETTINGS) == settings:
        _log.info("%s is there already", root)
        return
    if root.exists() and not (root.is_dir() and next(root.iterdir(), None) is None):
        raise FileExistsError(f"{root}: exists and is not a shapes set of these settings")

    partial = root.with_name(f"{root.name}.partial")
    if partial.exists() and _text_of(partial / _SETTINGS) != settings:
        begun = {_SETTINGS, f"{_SETTINGS}.partial"}
        if any(partial.iterdir()) and not any((partial / name).is_file() for name in begun):
            raise FileExistsError(f"{partial}: exists and is not an unfinished shapes set")
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write(partial / _SETTINGS, settings.encode())
    counts = {"train": shapes.train, "val": shapes.val}
    folder, write = partial, _write_classified
    if shapes.layout == "voc":
        folder, write = partial / "VOCdevkit/VOC2012", _write_sample
        for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(counts.values()), desc="shapes", unit="image", disable=None) as bar:
        for split, count in counts.items():
            for number in range(count):
                write(folder, shapes, split, number)
                bar.update()
    if shapes.layout == "voc":
        _write_lists(folder, counts)
        _write(partial / "classes.txt", "".join(f"{name}\n" for name in SHAPE_CLASSES).encode())
    partial.replace(root)


def scene(shapes: Shapes, split: str, number: int) -> Scene:
    """The scene of one image, before it is written.

    Raises:
        ValueError: if `split` is neither train nor val.
    """
    _require(split in _SPLITS, "split", " or ".join(_SPLITS), split)
    rng = np.random.default_rng([shapes.seed, _SPLITS.index(split), number])
    classified = shapes.layout == "image-folder"
    for _ in range(_TRIES):
        drawn = draw_scene(
            rng,
            height=shapes.height,
            width=shapes.width,
            warp=shapes.warp,
            objects=(1, 1) if classified else shapes.objects,
            radius=shapes.radius,
            clutter=shapes.clutter,
            mute=shapes.mute,
            void_border=shapes.void_border,
            label=_label(number) if classified else None,
        )
        if drawn.objects or not classified:
            return drawn
    raise ValueError(f"radius: no object of {shapes.radius} of the shorter side shows in an image")


def _write_sample(folder: Path, shapes: Shapes, split: str, number: int) -> None:
    name = _name(split, number)
    annotation = folder / f"Annotations/{name}.xml"
    if annotation.is_file():  # written last: the others are there
        return
    drawn = scene(shapes, split, number)
    _write(folder / f"JPEGImages/{name}.jpg", _jpeg(drawn.image))
    _write(folder / f"SegmentationClass/{name}.png", _palette_png(drawn.labels))
    _write(folder / f"SegmentationObject/{name}.png", _palette_png(drawn.instances))
    _write(annotation, _annotation(name, drawn))


def _write_classified(folder: Path, shapes: Shapes, split: str, number: int) -> None:
    path = folder / split / SHAPE_CLASSES[_label(number)] / f"{_name(split, number)}.jpg"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, _jpeg(scene(shapes, split, number).image))


def _label(number: int) -> int:
    """The class of an image of the layout by class: each in turn."""
    return 1 + number % len(OBJECTS)


def _settings_text(shapes: Shapes) -> str:
    values = {"drawing": _DRAWING, **asdict(shapes)}
    if shapes.layout == "voc":  # as in the sets that were made when there was no other
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
    image.save(png, "PNG")
    return png.getvalue()


def _annotation(name: str, drawn: Scene) -> bytes:
    height, width, depth = drawn.image.shape
    root = ElementTree.Element("annotation")
    _add(root, "folder", "VOC2012")
    _add(root, "filename", f"{name}.jpg")
    source = ElementTree.SubElement(root, "source")
    _add(source, "database", "deformnet shapes")
    size = ElementTree.SubElement(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", depth)):
        _add(size, tag, value)
    _add(root, "segmented", 1)
    for item in drawn.objects:
        share = item.area / item.full_area
        element = ElementTree.SubElement(root, "object")
        _add(element, "name", SHAPE_CLASSES[item.label])
        _add(element, "pose", "Unspecified")
        _add(element, "truncated", int(share < _TRUNCATED_SHARE))
        difficult = share < _DIFFICULT_SHARE or item.area < _DIFFICULT_AREA
        _add(element, "difficult", int(difficult))
        # VOC counts pixels from 1 and both ends are inside.
        x1, y1, x2, y2 = item.box
        box = ElementTree.SubElement(element, "bndbox")
        for tag, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            _add(box, tag, value)
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, tag: str, value: object) -> None:
    ElementTree.SubElement(parent, tag).text = str(value)


def _write(path: Path, content: bytes) -> None:
    """Writes beside and renames, so that a file is whole or absent."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: wanted {wanted}, got {got}")
