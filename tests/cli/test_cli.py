"""The command line: what it prints, what it writes, and one line for whatever is wrong."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import deformnet.engine
from deformnet.cli import main
from deformnet.data.synthetic import Shapes, write_shapes

QUICK = [
    *("--recipe", "scratch"),
    *("--backbone", "resnet18", "--deform-layers", "1", "--short-side", "32", "--max-side", "None"),
    *("--batch", "2", "--iterations", "2", "--accelerator", "cpu", "--workers", "0"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, Shapes(train=2, val=2, height=40, width=48))
    return root


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run folder, trained from the command line."""
    out = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "deeplab", "--data", str(shapes), "--out", str(out), *QUICK])
    return out


@pytest.fixture
def copy(shapes, tmp_path):
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(shapes, tmp_path / "copy"))


def test_train_evaluate_predict(run, shapes, tmp_path, capsys):
    assert json.loads((run / "recipe.json").read_text())["iterations"] == 2
    main(["evaluate", str(run), "--data", str(shapes), "--split", "train"])
    table = capsys.readouterr().out
    metrics = json.loads((run / "metrics-train.json").read_text())
    assert "IoU on train (2 images), percent" in table
    assert f"{100 * metrics['mean_iou']:.1f}" in table
    for name in metrics["iou"]:
        assert name in table

    images = sorted((shapes / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    main(["predict", str(run), *map(str, images[:2]), "--out", str(tmp_path)])
    for image in images[:2]:
        with Image.open(tmp_path / "labels" / f"{image.stem}.png") as labels:
            assert labels.size == (48, 40)
        assert (tmp_path / "overlays" / f"{image.stem}.jpg").is_file()


def test_a_recipe_file_repeats_a_run(run, shapes, tmp_path):
    again = tmp_path / "again"
    options = ["--recipe", run / "recipe.json", "--data", shapes, "--out", again, "--seed", "5"]
    options += ["--accelerator", "cpu", "--workers", "0"]
    main(["train", "deeplab", *map(str, options)])
    first, second = (json.loads((r / "recipe.json").read_text()) for r in (run, again))
    assert second == first | {"seed": 5}


def test_broken_images_are_named_and_the_others_done(run, shapes, tmp_path, complaint):
    good = next((shapes / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(good.read_bytes()[:600])
    line = complaint("predict", run, broken, good, "--out", tmp_path / "out")
    assert line.startswith(f"{broken}: ")
    assert [p.name for p in (tmp_path / "out/labels").iterdir()] == [f"{good.stem}.png"]


def voc(root):
    return root / "VOCdevkit/VOC2012"


def no_folder(root):
    (root / "VOCdevkit").rename(root / "elsewhere")
    return root


def empty_list(root):
    path = voc(root) / "ImageSets/Segmentation/train.txt"
    path.write_text("")
    return path


def absent_file(root):
    path = voc(root) / "ImageSets/Segmentation/train.txt"
    path.write_text("nobody\n")
    return path


def first_mask(root):
    name = (voc(root) / "ImageSets/Segmentation/train.txt").read_text().split()[0]
    return voc(root) / f"SegmentationClass/{name}.png"


def mask_of_another_size(root):
    path = first_mask(root)
    Image.fromarray(np.zeros((7, 9), dtype=np.uint8)).save(path)
    return path


def label_above_the_classes(root):
    path = first_mask(root)
    Image.fromarray(np.full((40, 48), 200, dtype=np.uint8)).save(path)
    return path


def truncated_image(root):
    path = voc(root) / "JPEGImages" / f"{first_mask(root).stem}.jpg"
    path.write_bytes(path.read_bytes()[:600])
    return path


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    "damage",
    [
        no_folder,
        empty_list,
        absent_file,
        mask_of_another_size,
        label_above_the_classes,
        truncated_image,
    ],
)
def test_bad_data_ends_training_with_a_line(copy, tmp_path, complaint, damage, workers):
    named = damage(copy)
    options = [*QUICK, "--workers", workers]
    line = complaint("train", "deeplab", "--data", copy, "--out", tmp_path / "run", *options)
    assert line.startswith(f"{named}: ")
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_other_bad_input_ends_with_a_line(run, shapes, tmp_path, complaint):
    train = ["train", "deeplab", "--data", shapes, *QUICK]
    assert "expected batch to be" in complaint(*train, "--out", tmp_path, "--batch", "0")
    assert "processes (3)" in complaint(*train, "--out", tmp_path, "--devices", "3")
    assert "lr=0.02" in complaint(*train, "--out", run, "--lr", "1")
    assert "nowhere.json" in complaint(*train, "--out", tmp_path, "--recipe", "nowhere.json")
    assert "nope: no such run folder" in complaint("evaluate", "nope", "--data", shapes)
    assert "the splits are: train" in complaint("evaluate", run, "--data", shapes, "--split", "x")
    assert "at least one image file" in complaint("predict", run, "--out", tmp_path)
    assert f"{tmp_path}: no image" in complaint("predict", run, tmp_path, "--out", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"PK")
    assert "last.ckpt: damaged" in complaint("predict", tmp_path, "x.jpg", "--out", tmp_path)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, tmp_path):
    def faulty(*args, **kwargs):
        return int("x" if args else "y") + len(kwargs)

    monkeypatch.setattr(deformnet.engine, "train", faulty)
    with pytest.raises(ValueError, match="invalid literal") as raised:
        main(["train", "deeplab", "--data", str(tmp_path), "--out", str(tmp_path), *QUICK])
    assert "report it with this traceback" in raised.value.__notes__[0]


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"deformnet {deformnet.__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["data", "chek", "DIR"], "unknown command 'chek'; did you mean 'check'?"),
        (["train", "fast-rcnn"], "did you mean 'faster-rcnn'?"),
        (["weights", "import", "xyz"], "Commands: mmdetection, detectron2"),
    ],
)
def test_a_misspelled_command(complaint, words, hint):
    assert hint in complaint(*words)


def test_options_of_training_are_grouped(capsys):
    with pytest.raises(SystemExit):
        main(["train", "rfcn", "--help"])
    text = capsys.readouterr().out
    titles = [f"{name} options" for name in ("data", "run", "network", "schedule", "hardware")]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert text.index("--data {None}|PATH") < text.index("--split") < text.index("--out PATH")
    assert "Proposal files written by `deformnet propose`" in text


FINETUNE = [arg for arg in QUICK if arg not in ("--recipe", "scratch")]


def test_settings_for_own_data_by_default(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "deeplab", "--data", str(shapes), "--out", str(out)]
    main([*train, *FINETUNE, "--init", "none", "--val-split", "None"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "data: 2 images to train on (train), no validation images"
    assert "schedule: 2 iterations of 2 images, 2 passes over the data; sgd, cosine" in lines
    assert "device: CPU, 32-true" in lines
    assert "initial weights: random" in lines
    assert "Traceback" not in printed.err
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["init"], recipe["norm"]) == (None, "trained")
    assert (recipe["offset_lr_scale"], recipe["clip"], recipe["ema"]) == (0.1, 10.0, 0.99)
    # Further, with the settings of the run.
    train += ["--log-every", "1", "--accelerator", "cpu", "--workers", "0"]
    main([*train, "--continue-to", "4"])
    printed = capsys.readouterr()
    assert "resuming after iteration 2 of 4" in printed.out
    for line in ("training: 3 of 4, loss ", "training: 4 of 4, loss ", "training: mean IoU "):
        assert line in printed.err
    assert json.loads((out / "recipe.json").read_text()) == recipe | {"iterations": 4}


def test_pretrained_weights_without_a_network(shapes, tmp_path, complaint, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    line = complaint("train", "deeplab", "--data", shapes, "--out", tmp_path, *FINETUNE)
    assert "cannot download IMAGENET1K_V1 from https://" in line
    assert "(--init FILE), or start from random weights (--init none)" in line
    assert not (tmp_path / "recipe.json").exists()


def test_epochs_and_settings_of_the_paper(shapes, tmp_path, capfd, complaint):
    train = ["train", "deeplab", "--data", str(shapes), "--out", str(tmp_path), *QUICK]
    both = complaint(*train, "--epochs", "2")
    assert both == "expected --epochs or --iterations, but got both"
    at = train.index("--iterations")
    main([*train[:at], *train[at + 2 :], "--epochs", "1", "--val-split", "None"])
    assert json.loads((tmp_path / "recipe.json").read_text())["iterations"] == 1
    with pytest.raises(SystemExit):
        main(["train", "rfcn", "--recipe", "paper", "--help"])
    assert "240" not in (text := capfd.readouterr().out)
    assert "msra2017" in text
    assert "IMAGENET1K_V1" in text


@pytest.mark.parametrize("folder", [".", "/", ".."])
def test_initial_weights_from_a_folder_without_a_run(folder, shapes, tmp_path, complaint):
    train = ["train", "deeplab", "--data", shapes, "--out", tmp_path / "run", *QUICK]
    assert complaint(*train, "--init", folder).startswith(f"{folder}: expected a trained run")


def test_initial_weights_from_a_run(run, shapes, tmp_path, capsys):
    """The backbone and the number of deformable layers are those of the run."""
    train = ["train", "deeplab", "--data", str(shapes), "--out", str(tmp_path)]
    options = [*("--iterations", "1"), *("--accelerator", "cpu", "--workers", "0")]
    main([*train, "--init", str(run), *options])
    assert f"initial weights: {run}, backbone and head: " in capsys.readouterr().out
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["backbone"], recipe["deform_layers"], recipe["norm"]) == (
        "resnet18",
        1,
        "frozen",
    )


def test_synthesize(tmp_path, capsys):
    root = tmp_path / "shapes"
    sizes = ["--train", "1", "--val", "1", "--height", "32", "--warp", "1"]
    main(["data", "synthesize", str(root), *sizes])
    assert "1 training and 1 validation images" in capsys.readouterr().out
    assert json.loads((root / "shapes.json").read_text())["warp"] == 1
    shown = dataclasses.asdict(Shapes())
    with pytest.raises(SystemExit):
        main(["data", "synthesize", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in shown)


def test_doctor(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    for word in ("deformnet", "torch", "machine", "reference", "cpu", "triton"):
        assert f"\n{word}" in f"\n{text}"


def test_help_needs_no_torch():
    """It is asked for often, and PyTorch alone takes more than a second to import."""
    code = (
        "import sys; from deformnet.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


DETECTOR = [*QUICK, *("--anchor-sizes", "16", "--proposals", "10", "--score-threshold", "0")]


@pytest.fixture(scope="module")
def detector(shapes, tmp_path_factory):
    """A run folder of an R-FCN, trained from the command line."""
    out = tmp_path_factory.mktemp("runs") / "rfcn"
    main(["train", "rfcn", "--data", str(shapes), "--out", str(out), *DETECTOR])
    return out


def test_a_detector_from_training_to_predictions(detector, shapes, tmp_path, capsys):
    capsys.readouterr()
    options = ["--scales", "32", "48", "--flip", "--refine", "2", "--box-averaging"]
    main(["evaluate", str(detector), "--data", str(shapes), *options])
    table = capsys.readouterr().out
    metrics = json.loads((detector / "metrics-val.json").read_text())
    assert "VOC AP (area) on val (2 images), percent" in table
    for name in (*metrics["voc"]["area"]["objects"], "mean"):
        assert name in table

    images = sorted((shapes / "VOCdevkit/VOC2012/JPEGImages").glob("val*.jpg"))
    out = tmp_path / "out"
    threshold = ["--threshold", "0.0"]
    main(["predict", str(detector), *map(str, images), "--out", str(out), *threshold])
    assert "2 of 2 images done" in capsys.readouterr().out
    assert len((out / "detections.jsonl").read_text().splitlines()) == 2
    for image in images:
        assert (out / "pictures" / f"{image.stem}.jpg").is_file()

    command = ["--data", str(shapes), "--split", "val", "--ious", "0.1", "0.5"]
    main(["score", "--boxes", str(out / "detections.jsonl"), *command])
    table = capsys.readouterr().out
    assert "VOC AP (11-point), percent" in table
    assert "AP@0.1" in table


def test_proposals_from_the_command_line(detector, shapes, tmp_path, capsys):
    files = []
    for split in ("train", "val"):
        files.append(str(tmp_path / f"{split}.safetensors"))
        main(
            ["propose", str(detector), "--data", str(shapes), "--split", split, "--out", files[-1]]
        )
        assert "proposals for 2 images" in capsys.readouterr().out
    command = ["train", "faster-rcnn", "--data", str(shapes), "--out", str(tmp_path / "run")]
    main([*command, *DETECTOR, "--stored-proposals", *files])
    assert (tmp_path / "run/metrics.json").is_file()


def test_options_that_do_not_apply(detector, run, shapes, tmp_path, complaint):
    data = ["--data", shapes, "--split", "val"]
    at = ["--score-at", "network"]
    assert complaint("evaluate", detector, *data, *at) == "score_at does not apply to rfcn"
    assert "augmentation does not apply to deeplab" in complaint("evaluate", run, *data, "--flip")
    message = complaint("propose", run, "--data", shapes, "--out", tmp_path / "p")
    assert "expected a detector, which makes proposals, but got deeplab" in message
    message = complaint("train", "rfcn", "--recipe", run / "recipe.json", "--data", shapes)
    assert message == f"{run}/recipe.json: expected a recipe of rfcn, but got deeplab"
    lines = (detector / "detections.jsonl").read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text(lines[0].replace("val_000000", "nowhere"))
    message = complaint("score", "--boxes", other, "--data", shapes, "--split", "val")
    assert "nowhere" in message


def test_parameters(capsys):
    main(["paper", "parameters"])
    printed = capsys.readouterr().out
    cells = [line.replace("(", "").replace(")", "").split() for line in printed.splitlines()]
    rows = {name: list(map(float, numbers[:6])) for name, *numbers in cells[2:6]}
    # Ours and the paper's: plain, deformable, and what it adds.
    assert rows == {
        "deeplab": [44.620, 46.0, 44.869, 46.1, 0.249, 0.1],
        "class-aware-rpn": [49.433, 46.0, 49.682, 46.1, 0.249, 0.1],
        "faster-rcnn": [57.024, 58.3, 58.502, 59.9, 1.478, 1.6],
        "rfcn": [45.854, 47.1, 48.313, 49.5, 2.459, 2.4],
    }
    assert "64.382 (64.3)" in printed
    main(["paper", "parameters", "--classes", "3"])
    table, classifiers = capsys.readouterr().out.split("classifiers")
    assert "46.1" not in table  # the paper has no numbers for these
    assert "64.382 (64.3)" in classifiers


def test_values_that_only_a_network_refuses(run, shapes, detector, tmp_path, complaint):
    train = ["train", "deeplab", "--data", shapes, "--out", tmp_path / "run", *QUICK]
    assert "not a multiple of 7 groups" in complaint(*train, "--offset-groups", "7")
    score = ["score", "--boxes", detector / "detections.jsonl", "--data", shapes, "--split", "val"]
    assert "expected ious to be thresholds" in complaint(*score, "--ious", "1.5")
    assert "expected num_classes" in complaint("paper", "parameters", "--classes", "300")
    predict = ["predict", run, "photo.jpg", "--out", tmp_path]
    assert "expected device such as" in complaint(*predict, "--device", "foo")
    file = run / "recipe.json"
    assert "expected a run folder" in complaint("predict", file, "photo.jpg", "--out", tmp_path)


@pytest.mark.parametrize("name", ["metrics-val.json", "confusion-matrix-val.png"])
def test_scores_that_cannot_be_written_are_printed(run, shapes, tmp_path, capfd, name):
    """As on a full disk or in a read-only folder; here, a folder has the name of the file."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).unlink(missing_ok=True)
    (copy / name / "full").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(copy), "--data", str(shapes), "--split", "val"])
    assert ended.value.code == 2
    table, complaint = capfd.readouterr()
    assert "IoU on val (2 images), percent" in table
    assert complaint.splitlines()[-1].startswith(f"deformnet: {copy / name}")


def test_weights_are_not_written_over_what_is_read(run, tmp_path, complaint):
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "recipe.json").read_bytes()
    line = complaint("export", copy, copy / "recipe.safetensors")
    assert line.startswith(f"{copy / 'recipe.json'}: expected a new file")
    assert (copy / "recipe.json").read_bytes() == before
    main(["export", str(copy), str(tmp_path / "a.safetensors")])
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    for other in ("a.safetensors", "b.safetensors"):
        words = ["weights", "import", "mmdetection", tmp_path / "a.safetensors", tmp_path / other]
        assert "expected a new path for the result" in complaint(*words)


def test_an_image_too_large_after_resizing_is_named(run, shapes, tmp_path, complaint):
    """1 x 20000 pixels: few bytes, but as many rows as any image after resizing."""
    root = Path(shutil.copytree(shapes, tmp_path / "copy")) / "VOCdevkit/VOC2012"
    for image in (root / "JPEGImages").glob("*.jpg"):
        strip = np.zeros((1, 20000), np.uint8)
        Image.fromarray(strip).save(image)
        Image.fromarray(strip).save(root / f"SegmentationClass/{image.stem}.png")
    sizes = ["--short-side", "160"]
    line = complaint(
        *("train", "deeplab", "--data", tmp_path / "copy", "--out", tmp_path), *QUICK, *sizes
    )
    assert re.search(r"image train_00000\d: expected an image of at most 100 million pixels", line)
    assert "resized to 3200000x160; crop it or leave it out" in line
