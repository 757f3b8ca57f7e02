"""`deformnet inspect analyze` on runs of a few iterations."""

import json
import shutil
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from deformnet.analysis import MeanStd
from deformnet.cli import main
from deformnet.data import open_segmentation
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import Hardware, LoopOptions, evaluate, train
from deformnet.engine.runs import checkpoint_path
from deformnet.inspection.report import analyze
from deformnet.inspection.report.bins import find_bins
from deformnet.inspection.runs import OpenedRun
from deformnet.inspection.settings import Analysis
from deformnet.recipes import DeepLabRecipe, FasterRCNNRecipe, RFCNRecipe
from deformnet.visualization import dilation_cell
from pages import Page

SIZE = 64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images that are not square, larger than the input of the networks."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    shapes = Shapes(train=2, val=3, height=80, width=100, objects=(2, 3), radius=(0.1, 0.4))
    write_shapes(root, shapes)
    return root


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Train a run for two iterations, once."""
    root = tmp_path_factory.mktemp("runs")
    common = {"backbone": "resnet18", "short_side": SIZE, "max_side": None}
    common |= {"batch": 2, "iterations": 2, "warmup": 0, "lr": 0.002}
    detector = {"anchor_sizes": (16, 32), "proposals": 20, "score_threshold": 0.0}
    detector |= {"max_detections": 10}
    recipes = {
        "deeplab": DeepLabRecipe(**common, deform_layers=3),
        "baseline": DeepLabRecipe(**common, deform_layers=0),
        "rfcn": RFCNRecipe(**common, **detector, deform_layers=2, pool="deformable", bins=3),
        "faster": FasterRCNNRecipe(**common, **detector, deform_layers=0, pool="deformable"),
    }

    def make(name):
        if not (root / name).exists():
            loop, hardware = LoopOptions(progress=False), Hardware(workers=0)
            train(recipes[name], data, root / name, val_split=None, loop=loop, hardware=hardware)
        return root / name

    return make


def checked(out):
    """Return the page of a folder after checking its files."""
    page = Page((out / "index.html").read_text())
    for name in page.pictures:
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 200
    for name in page.links:
        ElementTree.parse(out / name)
    assert [name.removesuffix(".png") for name in page.pictures] == [
        name.removesuffix(".svg") for name in page.links
    ]
    files = {path.name for path in out.iterdir()}
    assert files == {"index.html", "analysis.json", *page.pictures, *page.links}
    return page


def test_deeplab_with_its_baseline(runs, data, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--data", str(data), "--out", str(out), "--baseline", str(runs("baseline"))]
    main(["inspect", "analyze", str(runs("deeplab")), *options])
    assert str(out / "index.html") in capsys.readouterr().out
    page = checked(out)
    expected = ["fields", "sampling", "receptive-fields", "dilation", "contact-sheet"]
    expected.insert(0, "confusion-matrix")
    assert page.pictures == [f"{name}.png" for name in expected]

    found = json.loads((out / "analysis.json").read_text())
    assert (found["images"], found["split"]) == (3, "val")
    assert found["scores"] == evaluate(runs("deeplab"), data, "val", progress=False).scores.json
    assert f"{100 * found['scores']['mean_iou']:.1f}" in page.cells
    layers = [row["layer"] for row in found["effective_dilation"]]
    assert layers == [layer["layer"] for layer in found["offset_health"]]
    assert len(layers) == 3
    # 64 x 80 pixels of network input at stride 16, three images.
    for row in found["effective_dilation"]:
        spreads = {
            size: MeanStd(**row[size]) for size in ("small", "medium", "large", "background")
        }
        assert sum(spread.count for spread in spreads.values()) == 3 * 4 * 5
        assert all(dilation_cell(spread) in page.cells for spread in spreads.values())
    assert set(found["effective_receptive_fields"]) == {"baseline", "deformable"}
    assert set(found["cost"]) == {"baseline", "deformable"}
    assert found["cost"]["deformable"]["parameters"] > found["cost"]["baseline"]["parameters"]
    text = (out / "index.html").read_text()
    for said in (str(runs("deeplab")), str(runs("baseline")), "3 images of val", "disc"):
        assert said in text


def test_object_sizes_refer_to_the_original_image(runs, data, tmp_path):
    """An object of more than 96^2 pixels in an image whose network input is smaller than that."""
    enlarged = tmp_path / "large"
    shapes = Shapes(train=1, val=1, height=160, width=200, objects=(1, 1), radius=(0.45, 0.5))
    write_shapes(enlarged, shapes)
    labels = open_segmentation(enlarged, "val")[0][1]
    (rows, columns) = (labels > 0).nonzero().unbind(1)
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert 96**2 < area < 224**2
    found = analyze(runs("deeplab"), enlarged, tmp_path / "out")
    for row in found["effective_dilation"]:
        assert row["medium"]["count"] > 0
        assert row["small"]["count"] == row["large"]["count"] == 0


def test_rfcn_with_deformable_pooling(runs, data, tmp_path):
    found = analyze(runs("rfcn"), data, tmp_path)
    page = checked(tmp_path)
    expected = ["fields", "sampling", "receptive-fields", "dilation", "contact-sheet", "parts"]
    expected = ["confusion-matrix", "precision-recall", *expected]
    assert page.pictures == [f"{name}.png" for name in expected]
    assert len(found["parts"]) == 3
    for parts in found["parts"]:
        plain = torch.tensor(parts["plain"])
        assert plain.shape == (3, 3, 4)
        # The regular bins form the box, whose last pixel this sampling includes.
        edges = [*plain.amin((0, 1))[:2].tolist(), *plain.amax((0, 1))[2:].tolist()]
        assert edges == pytest.approx(parts["box"], abs=2)


def test_detector_without_deformable_convolutions(runs, data, tmp_path):
    found = analyze(runs("faster"), data, tmp_path)
    assert checked(tmp_path).pictures == [
        *("confusion-matrix.png", "precision-recall.png", "parts.png")
    ]
    assert "effective_dilation" not in found
    assert len(found["parts"]) == 3


def test_zero_offsets_on_some_images_and_one_class(runs, data, tmp_path):
    """All numbers are known; and there is no baseline."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(runs("deeplab"), run)
    checkpoint = torch.load(checkpoint_path(run))
    for name, tensor in checkpoint["model"].items():
        if ".conv_offset." in name:
            tensor.zero_()
    torch.save(checkpoint, checkpoint_path(run))
    shown = open_segmentation(data, "val")
    name = shown.classes[int(shown[1][1].max())]
    found = analyze(run, data, out, Analysis(images=2, objects=(name,)))
    assert "scores" not in found  # they are of all images
    checked(out)
    assert (found["images"], found["objects"]) == (2, [name])
    assert "the first 2 of 3 images of val" in (out / "index.html").read_text()
    assert json.loads(json.dumps(found)) == json.loads((out / "analysis.json").read_text())
    named = {unit["name"] for scene in found["scenes"] for unit in scene["units"]}
    assert named == {"background", name}
    for row in found["effective_dilation"]:
        assert row["background"]["mean"] == pytest.approx(2)
        assert row["background"]["std"] == pytest.approx(0, abs=1e-6)
    assert all(layer["max_shift"] == 0 for layer in found["offset_health"])
    fields = found["effective_receptive_fields"]
    assert fields["deformable"] == fields["offsets at zero"]


def test_rejected_runs_and_data(runs, data, tmp_path, complaint):
    run, out = runs("deeplab"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (lists,) = copy.rglob("ImageSets/Segmentation")
    (lists / "none.txt").write_text("")
    (classes,) = copy.rglob("classes.txt")
    classes.write_text(classes.read_text().replace("disc", "ball"))
    for message, *arguments in (
        ("expected a network with deformable layers", runs("baseline")),
        ("no such run folder", tmp_path / "none"),
        ("expected a trained run", tmp_path / "empty"),
        ("expected a data set with", run, "--data", tmp_path / "empty"),
        ("'nothing'", run, "--objects", "nothing"),
        ("expected images to be at least 1", run, "--images", "0"),
        ("other", run, "--split", "other"),
        ("expected a baseline without deformable layers", run, "--baseline", run),
        ("none", run, "--data", copy, "--split", "none"),
        ("trained on", run, "--data", copy),
    ):
        to = ["--data", data, "--out", out, *arguments[1:]]
        assert message in complaint("inspect", "analyze", arguments[0], *to)
    assert not out.exists()


def test_bins_are_in_pixels_of_the_image(runs, data):
    """Whatever the size of the network input."""
    run = OpenedRun(runs("rfcn"), "cpu")
    image, objects = run.task.annotated(data, "val")[0]
    enlarged = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for shown in (image, enlarged):
        (parts,) = find_bins(run.predictor, [(shown, objects)], 1)
        cell = 1 / min(run.predictor.prepare(shown).scale)  # includes the last pixel of the input
        edges = [*parts.regular.amin((0, 1))[:2].tolist(), *parts.regular.amax((0, 1))[2:].tolist()]
        expected = parts.box + torch.tensor([0, 0, cell, cell])
        assert edges == pytest.approx(expected.tolist(), abs=1.1 * cell)
