"""The fuzzers: valid files, how they are damaged, and the readers of the package."""

import dataclasses
import io
import json
import os
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from mutations import damage_bytes, damage_json, damage_json_lines, damage_text, damage_values
from PIL import Image
from torch import Tensor

from deformnet.cli import main
from deformnet.data import open_detection, open_segmentation
from deformnet.data.convert import convert
from deformnet.data.files import is_rotated, read_image, read_size, read_stored_mask
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import Hardware, LoopOptions, export_run, load_run, train
from deformnet.engine.runs import describe, load
from deformnet.engine.settings import SUFFIXES, WholeOptions
from deformnet.engine.whole import _DIGEST_KEY, _program, _to_onnx, _to_pt2
from deformnet.models._tensors import sealed
from deformnet.models.backbones.foreign import from_detectron2, from_mmdetection, read_checkpoint
from deformnet.models.backbones.weights import read_weights
from deformnet.models.detection.detector import Proposals
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, Recipe
from deformnet.tasks.base import Whole
from deformnet.tasks.proposals import StoredProposals, write_proposals
from deformnet.tasks.scoring import score
from fuzz import Fuzzer, Target

# Images.

_SAVED = {
    "rgb.jpg": ("RGB", {}),
    "gray.jpg": ("L", {"progressive": True}),
    "cmyk.jpg": ("CMYK", {}),
    "rgb.png": ("RGB", {}),
    "rgba.png": ("RGBA", {}),
    "palette.png": ("P", {"transparency": 0}),
    "bits.png": ("1", {}),
    "rgb.gif": ("RGB", {}),
    "plain.tif": ("RGB", {}),
    "lzw.tif": ("L", {"compression": "tiff_lzw"}),
    "jpeg.tif": ("RGB", {"compression": "jpeg"}),
    "float.tif": ("F", {}),
    "rgb.webp": ("RGB", {}),
    "lossless.webp": ("RGBA", {"lossless": True}),
    "rgb.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
    "rgb.ppm": ("RGB", {}),
    "gray.pgm": ("L", {}),
}


def images(folder: Path) -> list[Target]:
    """Images of all formats, read as images, as masks, and headers only."""
    files = {folder / name: _image(name) for name in _SAVED}
    deep = io.BytesIO()
    Image.fromarray(np.full((9, 11), 60_000, np.uint16)).save(deep, "PNG")
    files[folder / "deep.png"] = deep.getvalue()
    files[folder / "text.ppm"] = b"P3 3 2 255 " + b" 9 99 255" * 6

    def read(path: Path) -> None:
        for reader in (partial(read_image, orientation="auto"), read_size, is_rotated):
            reader(path)
        read_stored_mask(path)

    return [Target(files, damage_bytes, read)]


def _image(name: str) -> bytes:
    mode, options = _SAVED[name]
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if name == "rgb.jpg" else {}
    memory = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    image.save(memory, Image.registered_extensions()[Path(name).suffix], **options, **more)
    return memory.getvalue()


# Data sets.


def _shapes(folder: Path) -> Path:
    write_shapes(folder / "shapes", Shapes(train=2, val=1, height=40, width=48))
    return folder / "shapes"


def _existing(*paths: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in paths}


def _all_boxes(root: Path, path: Path) -> None:
    dataset = open_detection(root, "train")
    for index in range(len(dataset)):
        _ = dataset[index]


def _all_masks(root: Path, path: Path) -> None:
    dataset = open_segmentation(root, "train")
    for index in range(len(dataset)):
        _ = dataset[index]


def json_files(folder: Path) -> list[Target]:
    """COCO and labelme annotations, recipes, detections and COCO results."""
    shapes = _shapes(folder)
    convert(shapes, folder / "coco", "coco", progress=False)
    coco = folder / "coco/annotations/instances_train.json"
    content = json.loads(coco.read_text())
    run_lengths = {"size": [40, 48], "counts": [100, 500, 1320]}
    for number, annotation in enumerate(content["annotations"]):
        x, y, width, height = annotation["bbox"]
        outline = [x, y, x + width, y, x + width, y + height]
        annotation["segmentation"] = run_lengths if number % 2 else [outline]
    coco.write_text(json.dumps(content))
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"]}
        | {"bbox": one["bbox"], "score": 0.5}
        for one in content["annotations"]
    ]
    (folder / "results.json").write_text(json.dumps(results))

    labelme = folder / "labelme"
    labelme.mkdir()
    photo = next((shapes / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    shutil.copy(photo, labelme / "a.jpg")
    kinds = {"rectangle": [[4, 3], [12, 9]], "polygon": [[0, 0], [8, 0], [8, 8]]}
    kinds |= {"circle": [[20, 20], [25, 20]], "line": [[1, 1], [5, 9]], "point": [[3, 3]]}
    marks = [{"label": k, "shape_type": k, "points": p} for k, p in kinds.items()]
    size = {"imageHeight": 40, "imageWidth": 48, "imagePath": "a.jpg", "imageData": None}
    (labelme / "a.json").write_text(json.dumps({"version": "5", "shapes": marks, **size}))

    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(DeepLabRecipe().to_dict()))
    detections = folder / "detections.jsonl"
    lines = [
        {"image": path.stem, "boxes": [[1, 2, 30, 20]], "scores": [0.5], "classes": ["square"]}
        for path in sorted((shapes / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    ]
    detections.write_text("\n".join(map(json.dumps, lines)))
    return [
        Target(_existing(coco), damage_json, partial(_all_boxes, folder / "coco")),
        Target(_existing(coco), damage_json, partial(_all_masks, folder / "coco")),
        Target(_existing(coco), damage_json, partial(score, folder / "results.json")),
        Target(_existing(labelme / "a.json"), damage_json, partial(_all_boxes, labelme)),
        Target(_existing(labelme / "a.json"), damage_json, partial(_all_masks, labelme)),
        Target(_existing(recipe), damage_json, Recipe.load),
        Target(
            _existing(detections), damage_json_lines, lambda path: score(path, shapes, split="val")
        ),
        Target(_existing(folder / "results.json"), damage_json, lambda path: score(path, coco)),
    ]


def xml_files(folder: Path) -> list[Target]:
    """VOC annotations, in VOC's folders and next to the images."""
    shapes = _shapes(folder)
    year = shapes / "VOCdevkit/VOC2012"
    beside = folder / "beside"
    for path in (*year.glob("Annotations/*.xml"), *year.glob("JPEGImages/*.jpg")):
        beside.mkdir(exist_ok=True)
        shutil.copy(path, beside)
    files = _existing(*year.glob("Annotations/*.xml"))
    same = _existing(*beside.glob("*.xml"))
    return [
        Target(files, damage_xml, partial(_all_boxes, shapes)),
        Target(same, damage_xml, partial(_all_boxes, beside)),
    ]


def damage_xml(rng: random.Random, content: bytes) -> bytes:
    """Damages a text, or adds constructs that are hazardous for XML parsers."""
    if rng.random() < 0.95:
        return damage_text(rng, content)
    entities = b"".join(b'<!ENTITY e%d "%s">' % (n, b"&e%d;" % (n - 1) * 10) for n in range(1, 12))
    added = rng.choice(
        (
            b'<!DOCTYPE a [<!ENTITY e0 "x">' + entities + b"]>",
            b'<!DOCTYPE a [<!ENTITY e11 SYSTEM "file:///etc/passwd">]>',
            b'<?xml version="1.0" encoding="utf-16"?>',
            b'<?xml version="1.0" encoding="none"?>',
            b"<a>" * 100_000,
        )
    )
    return added + content.replace(b"<name>", b"<name>&e11;")


def damage_yaml(rng: random.Random, content: bytes) -> bytes:
    """Damages a text, or gives one of its keys a value of nested aliases, 10^11 words of text."""
    if rng.random() < 0.5:
        return damage_text(rng, content)
    levels = b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)
    )
    key = rng.choice((b"names", b"path", b"train", b"val", b"nc", b"other"))
    kept = re.sub(rb"(?m)^%s:.*\n([ -].*\n)*" % key, b"", content)
    return b"a0: &a0 word\n" + levels + kept + key + b": *a11\n"


def text_files(folder: Path) -> list[Target]:
    """YOLO's labels and names, VOC's lists and class names, and detections as text."""
    shapes = _shapes(folder)
    convert(shapes, folder / "yolo", "yolo", progress=False)
    yolo, year = folder / "yolo", shapes / "VOCdevkit/VOC2012"
    label = next((yolo / "labels/train").glob("*.txt"))
    polygons = folder / "polygons"
    shutil.copytree(yolo, polygons)
    outline = polygons / label.relative_to(yolo)
    outline.write_text("0 0.2 0.2 0.8 0.2 0.8 0.8\n1 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9\n")
    results = folder / "results"
    results.mkdir()
    (results / "a.txt").write_text("square 0.9 1 2 30 20\ncircle 0.5 3.5 4 10 10\n")
    truth = folder / "truth"
    truth.mkdir()
    (truth / "a.txt").write_text("square 1 2 30 20\ncircle 3.5 4 10 10\n")
    lists = (year / f"ImageSets/{kind}/train.txt" for kind in ("Main", "Segmentation"))
    voc = _existing(*lists, shapes / "classes.txt")
    return [
        Target(_existing(label, yolo / "data.yaml"), damage_text, partial(_all_boxes, yolo)),
        Target(_existing(yolo / "data.yaml"), damage_yaml, partial(_all_boxes, yolo)),
        Target(
            _existing(outline, polygons / "data.yaml"), damage_text, partial(_all_masks, polygons)
        ),
        Target(voc, damage_text, partial(_all_boxes, shapes)),
        Target(voc, damage_text, partial(_all_masks, shapes)),
        Target(_existing(results / "a.txt"), damage_text, lambda path: score(results, truth)),
        Target(_existing(truth / "a.txt"), damage_text, lambda path: score(results, truth)),
    ]


# Weights.

_RECIPE = ClassifierRecipe(
    backbone="timm/test_resnet", resize=(32, 40), crop=32, test_short_side=32, batch=2, iterations=1
)
_CPU = Hardware(accelerator="cpu", workers=0)


def _run(folder: Path) -> Path:
    """A run folder of a classifier with 0.5 M parameters."""
    shapes, run = folder / "classes", folder / "run"
    write_shapes(shapes, Shapes(train=8, val=8, height=40, width=48, layout="image-folder"))
    _in_child(lambda: train(_RECIPE, shapes, run, val_split=None, hardware=_CPU))
    return run


def _variants(value: object) -> list[object]:
    """Other tensors for a tensor."""
    if not isinstance(value, Tensor) or value.is_quantized:
        return [torch.zeros(2), torch.tensor(float("nan"))]
    floats = value.float()
    return [
        *(
            value[None],
            value.flatten()[:1],
            value.double(),
            value.long(),
            value.to(torch.complex64),
        ),
        *(floats.to_sparse(), torch.full_like(floats, float("nan")), value.bool(), value.half()),
        *(torch.full_like(floats, 3e38), torch.empty(0), value.expand(2, *value.shape)),
        *(torch.zeros(2**20).expand(2**20, 2**20), torch.empty(value.shape, device="meta")),
        *(torch.nn.Parameter(floats), torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8)),
    ]


def damage_checkpoint(rng: random.Random, content: bytes) -> bytes:
    """Damages the values, or the bytes, of a PyTorch checkpoint."""
    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    value = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        value = damage_values(rng, value, _variants)
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Damages the header, or the bytes, of a safetensors file."""
    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = damage_json(rng, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damage_pt2(rng: random.Random, content: bytes) -> bytes:
    """Damages a record of a .pt2 file, whose checksum is then that of the damaged record, or the
    bytes of the file."""
    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    damaged, memory = rng.choice(list(records)), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(memory)
    for name, record in records.items():
        if name == damaged:
            is_json = record.startswith(b"{") and rng.random() < 0.8
            record = (damage_json if is_json else damage_bytes)(rng, record)
        if not name.startswith((".data/", "byteorder")):  # of the writer
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return memory.getvalue()


def damage_onnx(rng: random.Random, content: bytes) -> bytes:
    """Damages the metadata of an .onnx file, whose SHA-256 is then that of the damaged file, or the
    bytes of the file."""
    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    model = onnx.load_from_string(content)
    for entry in model.metadata_props:
        if entry.key == "deformnet":
            text = damage_json(rng, entry.value.encode())
            entry.value = text.decode(errors="replace")
        if entry.key == "sha256":
            entry.value = "0" * 64
    return sealed(model.SerializeToString(), _DIGEST_KEY)


class _Means(torch.nn.Module):
    """A classifier with weights, which loads in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


def exports(folder: Path) -> list[Target]:
    """Whole networks, for other programs."""
    run, options = _run(folder), WholeOptions(size=(32, 32))

    def export() -> None:
        recipe, _, data = load_run(run)
        description = {
            **describe(recipe, data),
            **{"options": dataclasses.asdict(options), "outputs": ["logits"]},
            **{"normalization": "", "interpolation": ""},
        }
        program = _program(Whole(_Means(), outputs=("logits",)), options)
        for suffix, write in zip(SUFFIXES, (_to_onnx, _to_pt2), strict=True):
            (folder / f"net{suffix}").write_bytes(write(program, options, description))

    _in_child(export)
    damages = (damage_onnx, damage_pt2)
    return [
        Target(_existing(folder / f"net{suffix}"), damage, load)
        for suffix, damage in zip(SUFFIXES, damages, strict=True)
    ]


def checkpoints(folder: Path) -> list[Target]:
    """Checkpoints as runs and as initial weights, exports, weights of others, proposals."""
    run = _run(folder)
    checkpoint = run / "checkpoints/last.ckpt"
    exported = folder / "net.safetensors"
    card = export_run(run, exported)
    proposals = folder / "proposals.safetensors"
    boxes = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    write_proposals(proposals, ["a", "b"], [Proposals(boxes, torch.tensor([0.9, 0.1]))] * 2)
    foreign = folder / "foreign.pth"
    blocks = {f"layer{n}.0.conv1.weight": torch.zeros(8, 8, 3, 3) for n in range(1, 5)}
    state = {"conv1.weight": torch.ones(8, 3, 7, 7), **blocks}
    torch.save({"meta": {}, "state_dict": {f"backbone.{k}": v for k, v in state.items()}}, foreign)

    def convert_foreign(path: Path) -> None:
        content = read_checkpoint(path)
        from_mmdetection(content)
        from_detectron2(content)

    def loaded_export(path: Path) -> None:
        load_run(exported)

    return [
        Target(_existing(checkpoint), damage_checkpoint, lambda path: load_run(run)),
        Target(_existing(checkpoint), damage_checkpoint, lambda path: read_weights(run)),
        Target(_existing(exported), damage_safetensors, read_weights),
        Target(_existing(exported), damage_safetensors, loaded_export),
        Target(_existing(card), damage_json, loaded_export),
        Target(_existing(proposals), damage_safetensors, lambda path: StoredProposals([path])),
        Target(_existing(foreign), damage_checkpoint, convert_foreign),
    ]


def resumed_runs(folder: Path) -> list[Target]:
    """Checkpoints from which training resumes."""
    shapes = _shapes(folder)
    recipe = DeepLabRecipe(
        **{"backbone": "timm/test_resnet", "deform_layers": 1, "short_side": 32, "max_side": None},
        **{"batch": 2, "iterations": 1, "warmup": 0, "ema": 0.5},
    )
    out = folder / "run"

    def resume(path: Path, iterations: int = 2) -> None:
        with suppress(FloatingPointError):  # weights that are finite, but huge
            train(
                *(recipe, shapes, out),
                val_split=None,
                continue_to=iterations if path.is_file() else None,
                hardware=_CPU,
                loop=LoopOptions(progress=False),
            )

    checkpoint = out / "checkpoints/last.ckpt"
    _in_child(lambda: resume(checkpoint))
    return [Target(_existing(checkpoint), damage_checkpoint, resume)]


def _in_child(act: Callable[[], object]) -> None:
    """Autograd does not work in children of a process that has used it."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


# Command lines.

_LINES = (
    "predict run classes/val --out out --device cpu",
    "predict net.safetensors classes/val --out out --device cpu",
    "predict run classes/val --out out --device cpu --threshold 0.5 --format jsonl",
    "export run new.safetensors",
    "data check voc --workers 0 --record record.jsonl --report report.txt --custom",
    "data convert voc converted --layout yolo --hard-links",
    "data synthesize new --train 1 --val 1 --height 40 --width 48 --seed 1",
    "score --boxes boxes.jsonl --data voc --split val --ious 0.5 0.7",
    "evaluate run --data classes --split val --accelerator cpu --workers 0",
    "propose run --data voc --split val --out new.safetensors --accelerator cpu --workers 0",
    "train classifier --data classes --out run --accelerator cpu --workers 0",
    "weights import mmdetection net.safetensors new.safetensors --bgr",
)
_STRANGE = ("", " ", "-1", "nan", "1e300", "9" * 30, "None", "x" * 300, ".", "\x01", "-", "--", "é")


def command_lines(folder: Path) -> list[Target]:
    """Valid command lines with arguments replaced, removed, repeated or swapped."""
    given, case, words = folder / "given", folder / "case", folder / "words.txt"
    write_shapes(given / "voc", Shapes(train=1, val=1, height=40, width=48))
    export_run(_run(given), given / "net.safetensors")
    line = {
        "image": "val_000000",
        "boxes": [[1, 2, 30, 20]],
        "scores": [0.5],
        "classes": ["square"],
    }
    (given / "boxes.jsonl").write_text(json.dumps(line))

    def read(path: Path) -> None:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(given, case)
        os.chdir(case)
        try:
            main(words.read_text().split("\n"))
        except SystemExit as ended:
            if ended.code not in (None, 0, 1, 2):
                raise ValueError(f"exit code {ended.code}") from ended

    return [Target({words: line.encode()}, _damage_words, read) for line in _LINES]


def _damage_words(rng: random.Random, content: bytes) -> bytes:
    """Damages the arguments of a line; some are replaced by those of other lines."""
    words = content.decode().split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(words))
        match rng.randrange(5):
            case 0 if len(words) > 1:
                del words[at]
            case 1:
                words.insert(at, rng.choice(words))
            case 2:
                words[at] = rng.choice(rng.choice(_LINES).split())
            case 3:
                other = rng.randrange(len(words))
                words[at], words[other] = words[other], words[at]
            case _:
                words[at] = rng.choice(_STRANGE)
    return "\n".join(words).encode()


FUZZERS = {
    "images": Fuzzer(images, 100),
    "json": Fuzzer(json_files, 80),
    "xml": Fuzzer(xml_files, 30),
    "texts": Fuzzer(text_files, 60),
    "checkpoints": Fuzzer(checkpoints, 20),
    "exports": Fuzzer(exports, 40),
    "resumed": Fuzzer(resumed_runs, 3),
    "commands": Fuzzer(command_lines, 12),
}
