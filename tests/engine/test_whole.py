"""Whole networks as .onnx and .pt2: the same predictions as from the weights; damage is refused."""

import dataclasses
import io
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from benchmarks.exports import distances, random_run
from PIL import Image
from torch.nn import functional as F
from torchvision.io import write_png

import deformnet
from damage import cases, flipped, result
from deformnet._errors import MissingExtraError, UserError
from deformnet.cli import main
from deformnet.engine.export import Facts, write_export
from deformnet.engine.runs import TrainedRun, describe
from deformnet.engine.settings import SUFFIXES, WholeOptions
from deformnet.engine.whole import _program, _to_onnx, _to_pt2, export_whole, load_whole
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    RPNRecipe,
    TestTimeAugmentation,
)
from deformnet.tasks import TaskOptions, task_of
from deformnet.tasks.base import Whole

SMALL = {"init": None, "backbone": "resnet18"}
SIZES = {"short_side": 96, "max_side": 160}
RECIPES = {
    "deeplab": DeepLabRecipe(**SMALL, **SIZES),
    "deeplab-8": DeepLabRecipe(**SMALL, **SIZES, output_stride=8),
    "classifier": ClassifierRecipe(**SMALL, crop=64, test_short_side=72, resize=(72, 80)),
    "rfcn": RFCNRecipe(**SMALL, **SIZES),
    "faster_rcnn": FasterRCNNRecipe(**SMALL, **SIZES),
    "class_aware_rpn": ClassAwareRPNRecipe(**SMALL, **SIZES),
    "rpn": RPNRecipe(**SMALL, **SIZES),
}
CLASSES = ("ring", "square", "star")
DETECTORS = ("rfcn", "faster_rcnn", "class_aware_rpn", "rpn")


def trained(name) -> TrainedRun:
    return random_run(RECIPES[name], CLASSES)


def pictures():
    generator = torch.Generator().manual_seed(1)
    for height, width in ((120, 150), (100, 100)):
        coarse = torch.rand(1, 3, height // 10, width // 10, generator=generator) * 255
        picture = F.interpolate(coarse, size=(height, width), mode="bicubic")[0]
        yield picture.clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


def weights_of(name, folder):
    path = folder / f"{name}.safetensors"
    if not path.exists():
        write_export(trained(name), Facts({}, {}), path)
    return path


def check_boxes(found, expected):
    assert len(expected.boxes) > 2
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-3)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("name", DETECTORS)
def test_whole_detectors_detect_what_predictors_do(name, folder):
    run = trained(name)
    task = task_of(run.recipe)
    whole = task.whole_predictor(task.whole(run.model, run.data).module, run.data, "cpu")
    predictor = task.predictor(run.model, run.data, "cpu")
    for picture in pictures():
        check_boxes(whole(picture), predictor(picture))


def test_deeplab_as_onnx(folder, capsys, tmp_path):
    onnx = pytest.importorskip("onnx")
    weights, out = weights_of("deeplab", folder), tmp_path / "net.onnx"
    main(["export", str(weights), str(out)])
    assert capsys.readouterr().out == f"network in {out}\n"
    predictor, expected = deformnet.load(out), deformnet.load(weights, device="cpu")
    for picture in pictures():
        found, right = predictor(picture), expected(picture)
        assert found.classes == right.classes == CLASSES
        assert len(right.labels.unique()) > 1
        assert (found.labels != right.labels).float().mean() < 1e-3
    image = tmp_path / "image.png"
    write_png(picture, str(image))
    main(["predict", str(out), str(image), "--out", str(tmp_path / "results")])
    assert "1 of 1 images done" in capsys.readouterr().out
    written = numpy.array(Image.open(tmp_path / "results/labels/image.png"))
    assert (written == found.labels.numpy()).all()
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["size"]) == "any"
    assert json.loads(metadata["normalization"]) == "inside"
    assert json.loads(metadata["recipe"])["network"] == "deeplab"


def test_unsupported_opset():
    pytest.importorskip("onnxscript")
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    with pytest.raises(UserError, match=r"expected opset to be supported by .*, but got 99"):
        _to_onnx(program, WholeOptions(opset=99), {"outputs": ["logits"]})


def test_a_detector_as_pt2_of_one_size(folder, tmp_path):
    weights, out = weights_of("class_aware_rpn", folder), tmp_path / "net.pt2"
    export_whole(weights, out, WholeOptions(size=(96, 120), normalize=False))
    predictor, expected = deformnet.load(out), deformnet.load(weights, device="cpu")
    fits, other = pictures()
    check_boxes(predictor(fits), expected(fits))
    with pytest.raises(UserError, match=r"expected an image that is 96 x 120 .* 96 x 96;"):
        predictor(other)
    with pytest.raises(UserError, match="expected no test-time augmentation for an exported"):
        deformnet.load(out, options=TaskOptions(augmentation=TestTimeAugmentation(flip=True)))
    with pytest.raises(UserError, match=r"expected device to be cpu for net.pt2, but got cuda"):
        deformnet.load(out, device="cuda")


# A minute each; the others only with DEFORMNET_FUZZ.
@pytest.mark.parametrize("name", DETECTORS if "DEFORMNET_FUZZ" in os.environ else DETECTORS[::2])
def test_detectors_as_onnx_on_real_images(name, folder, tmp_path, real_data):
    weights, out = weights_of(name, folder), tmp_path / "net.onnx"
    export_whole(weights, out, WholeOptions())
    predictor, expected = deformnet.load(out), deformnet.load(weights, device="cpu")
    images = sorted((real_data / "coco_tiny").rglob("*.jpg"))[:20]
    assert len(images) == 20
    apart = torch.cat([distances(predictor(image), expected(image)) for image in images])
    # 1e-3 pixels of the network's input, which is a fifth of the image's size.
    assert (apart < 5e-3).float().mean() > 0.999


def assert_same_probabilities(out, weights):
    predictor, expected = deformnet.load(out), deformnet.load(weights, device="cpu")
    for picture in pictures():
        found, right = predictor(picture).probabilities, expected(picture).probabilities
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


# AOTInductor's compilers take a minute of CPU time.
@pytest.mark.skipif("DEFORMNET_FUZZ" not in os.environ, reason="slow: set DEFORMNET_FUZZ")
def test_a_compiled_classifier(tmp_path, capsys):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    weights, out = tmp_path / "net.safetensors", tmp_path / "net.pt2"
    small = {"backbone": "timm/test_resnet", "deform_layers": 1, "init": None}
    recipe = ClassifierRecipe(**small, crop=32, test_short_side=32, resize=(32, 40))
    write_export(random_run(recipe, CLASSES), Facts({}, {}), weights)
    main(["export", str(weights), str(out), "--compile"])
    assert capsys.readouterr().out == f"network in {out}; it runs after `import deformnet`\n"
    assert_same_probabilities(out, weights)
    with zipfile.ZipFile(out) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.usefixtures("real_data")  # slow
def test_classifier_as_pt2(folder, tmp_path, capsys):
    weights, out = weights_of("classifier", folder), tmp_path / "net.pt2"
    main(["export", str(weights), str(out), "--standard"])
    assert capsys.readouterr().out == f"network in {out}\n"
    assert_same_probabilities(out, weights)
    program = torch.export.load(out)
    assert not [node for node in program.graph.nodes if "deformnet" in str(node.target)]


@pytest.mark.parametrize(("name", "size"), [("deeplab", (4, 5)), ("deeplab-8", (8, 10))])
def test_deeplab_as_pt2_without_its_upsampling(name, size, folder, tmp_path, capsys):
    weights, out = weights_of(name, folder), tmp_path / "net.pt2"
    main(["export", str(weights), str(out), "--no-resize"])
    assert capsys.readouterr().out == f"network in {out}; it runs after `import deformnet`\n"
    predictor, expected = deformnet.load(out), deformnet.load(weights, device="cpu")
    for picture in pictures():
        assert torch.equal(predictor(picture).labels, expected(picture).labels)
    logits = torch.export.load(out).module()(torch.zeros(3, 3, 64, 80, dtype=torch.uint8))
    assert logits.shape == (3, len(CLASSES), *size)


@pytest.mark.usefixtures("real_data")  # slow
def test_deeplab_as_onnx_without_its_upsampling(folder, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    weights, out = weights_of("deeplab", folder), tmp_path / "net.onnx"
    main(["export", str(weights), str(out), "--no-resize"])
    assert capsys.readouterr().out == f"network in {out}\n"
    predictor, expected = deformnet.load(out), deformnet.load(weights, device="cpu")
    for picture in pictures():
        different = predictor(picture).labels != expected(picture).labels
        assert different.float().mean() < 1e-3
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    images = torch.zeros(3, 3, 64, 80, dtype=torch.uint8).numpy()
    assert session.run(None, {"images": images})[0].shape == (3, len(CLASSES), 4, 5)


def test_options_that_do_not_apply(folder, tmp_path, complaint):
    weights = weights_of("rfcn", folder)
    onnx, other = tmp_path / "net.onnx", tmp_path / "net.safetensors"
    assert complaint("export", weights, onnx, "--opset", "18") == (
        "expected opset to be at least 19, but got 18"
    )
    assert complaint("export", weights, tmp_path / "net.pt2", "--opset", "19") == (
        f"out: expected NAME.onnx to set the opset, but got {tmp_path}/net.pt2"
    )
    assert complaint("export", weights, onnx, "--compile") == (
        f"out: expected NAME.pt2 to compile, but got {onnx}"
    )
    assert complaint("export", weights, onnx, "--no-resize") == (
        "expected resize to be True for rfcn, but got False"
    )
    assert complaint("export", weights, other, "--size", "64", "64") == (
        f"expected NAME.onnx or NAME.pt2 with these options, but got {other}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_that_are_no_networks(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    with pytest.raises(FileNotFoundError, match="no such file"):
        deformnet.load(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(
        UserError, match=rf"net{suffix}: expected an? .* file, but got a damaged or another file \("
    ):
        deformnet.load(path)


def test_a_program_that_is_not_ours(tmp_path):
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(UserError, match="expected a network that deformnet exported"):
        deformnet.load(tmp_path / "net.pt2")


# Damage.


class Small(torch.nn.Module):
    """A classifier whose export loads in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 3)
        self.linear = torch.nn.Linear(64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(images).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    """A network, and the content of its files by suffix."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    network, options = Small(), WholeOptions(size=(64, 64))
    run = trained("classifier")
    description = {
        **describe(run.recipe, run.data),
        **{
            "options": dataclasses.asdict(options),
            "outputs": ["logits"],
            "normalization": "",
            "interpolation": "",
        },
    }
    program = _program(Whole(network, outputs=("logits",)), options)
    contents = (write(program, options, description) for write in (_to_onnx, _to_pt2))
    return network, dict(zip(SUFFIXES, contents, strict=True))


def rewritten(content: bytes, name: str, record: bytes | None) -> bytes:
    """A .pt2 file with another record of valid checksum, or without one."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {path: archive.read(path) for path in archive.namelist()}
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for path, old in records.items():
        path = path.partition("/")[2]
        new = record if path == name else old
        if new is not None and not path.startswith((".data/", "byteorder")):  # of the writer
            writer.write_record(path, new, len(new))
    writer.write_end_of_file()
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_flipped_bit_is_used(suffix, small, tmp_path):
    network, contents = small
    path, picture = tmp_path / f"net{suffix}", next(pictures())
    path.write_bytes(content := contents[suffix])
    expected, found, count = deformnet.load(path)(picture).probabilities, 0, cases(100)
    for damaged in flipped(content, count):
        path.write_bytes(damaged)
        predictor = result(path, deformnet.load)
        assert predictor is None or torch.equal(predictor(picture).probabilities, expected)
        found += predictor is None
    assert found > count / 3
    exponent = bytearray(content)
    exponent[content.index(network.conv.weight.detach().numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(exponent)
    assert result(path, deformnet.load) is None


def test_no_flipped_bit_of_compiled_code_is_used(small, tmp_path):
    """Its checksum is verified before it is loaded, which would run it."""
    name = "data/aotinductor/model/network.so"
    content = rewritten(small[1][".pt2"], "models/model.json", None)
    content = rewritten(content, "data/sample_inputs/model.pt", b"code" * 100)
    content = content.replace(b"data/sample_inputs/model.pt", f"{name:/<27}"[:27].encode())
    (path := tmp_path / "net.pt2").write_bytes(content.replace(b"code", b"cade", 1))
    with pytest.raises(UserError, match=r"checksum mismatch in record .*aotinductor"):
        deformnet.load(path)


def test_an_older_onnx_file_without_a_digest(small, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(small[1][".onnx"])
    kept = [entry for entry in model.metadata_props if entry.key != "sha256"]
    assert len(kept) == len(model.metadata_props) - 1
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "net.onnx")
    assert deformnet.load(tmp_path / "net.onnx").classes == CLASSES


@pytest.mark.parametrize("record", [b"{}", b"[]", b"null", b"[" * 300_000, b"\xff", b"", None])
@pytest.mark.parametrize(
    "name",
    [
        *("extra/deformnet", "models/model.json", "data/weights/model_weights_config.json"),
        *("data/constants/model_constants_config.json", "data/sample_inputs/model.pt"),
        "archive_version",
    ],
)
def test_valid_archives_with_wrong_content(name, record, small, tmp_path, capfd):
    path = tmp_path / "net.pt2"
    path.write_bytes(rewritten(small[1][".pt2"], name, record))
    predictor = result(path, deformnet.load)
    assert predictor is None or record is None or "sample_inputs" in name  # which are not used
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failures_of_the_system_are_not_damage(suffix, small, tmp_path, monkeypatch):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(small[1][suffix])

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        with pytest.raises(PermissionError) as error:
            deformnet.load(path)
    assert error.value.filename == str(path)
    monkeypatch.setattr("torch.export.load", exhausted)
    monkeypatch.setattr("onnxruntime.InferenceSession", exhausted)
    with pytest.raises(MemoryError):
        deformnet.load(path)


def test_an_export_does_not_replace_its_input(folder, tmp_path, complaint):
    weights = weights_of("rfcn", folder)
    (out := tmp_path / "net.onnx").hardlink_to(weights)
    message = f"{out}: expected a new path for the result, but got the input {weights}"
    assert complaint("export", weights, out) == f"{message}; choose another name"


def test_missing_packages_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deformnet\[onnx\]'"):
        export_whole(folder / "any", tmp_path / "net.onnx", WholeOptions())
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"net.onnx needs onnxruntime, .*\[onnx\]'"):
        load_whole(tmp_path / "net.onnx", TaskOptions())


class Rounding(torch.nn.Module):
    """Computes a size with `math.ceil`, as some backbones of timm do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., : math.ceil(images.shape[-1] / 2)]


def test_sizes_that_cannot_be_saved():
    whole = Whole(Rounding(), outputs=("logits",))
    with pytest.raises(UserError, match=r"ceil.*; set --size HEIGHT WIDTH"):
        _to_pt2(_program(whole, options := WholeOptions()), options, {})
    fixed = WholeOptions(size=(64, 64))
    assert _to_pt2(_program(whole, fixed), fixed, {})
