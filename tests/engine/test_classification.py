"""Training, evaluating and predicting with a classifier, and starting another network from it."""

import dataclasses
import json

import pytest
import torch
from processes import (
    assert_equal_weights,
    curve,
    forked_torchrun,
    run,
    run_stopped,
    wait,
    weights,
)

import deformnet
from deformnet.cli import main
from deformnet.data.image_folder import ImageFolderClassification
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import Hardware, evaluate, load_run
from deformnet.engine.logs import read_log
from deformnet.models.backbones import aligned_inception_resnet
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, TestTimeAugmentation
from deformnet.tasks import TaskOptions, find_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 training and 12 validation images of six classes: large shapes on a plain ground."""
    root = tmp_path_factory.mktemp("data") / "folder"
    look = {"height": 40, "width": 44, "radius": (0.4, 0.45), "clutter": 0, "warp": 0.0}
    write_shapes(root, Shapes(train=24, val=12, mute=1.0, layout="image-folder", **look))
    return root


def recipe_of(**changes):
    values = {
        "backbone": "resnet18",
        "resize": (32, 40),
        "crop": 32,
        "test_short_side": 36,
        "batch": 4,
        "iterations": 6,
        "warmup": 2,
        "lr": 0.01,
    }
    return ClassifierRecipe(**(values | changes))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A finished run and what `train` returned."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run(recipe_of(), folder, out, val_split="val").to_json()


def test_contents_of_a_run_folder(trained):
    out, metrics = trained
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (metrics["network"], metrics["split"], metrics["images"]) == ("classifier", "val", 12)
    assert 0 <= metrics["top5_error"] <= metrics["top1_error"] <= 1
    # Two images of each class.
    mean = sum(metrics["class_errors"].values()) / 6
    assert metrics["top1_error"] == pytest.approx(mean)
    assert set(metrics["class_errors"]) == set(load_run(out).data.classes)
    rows = read_log(out / "metrics.csv")
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([0.001, 0.0055, 0.001, 0.001, 0.0001, 0.0001])
    state = load_run(out).model.state_dict()
    torch.manual_seed(recipe_of().seed)
    start = recipe_of().build_model(6).state_dict()
    same = {name for name in start if torch.equal(start[name], state[name])}
    assert not same


def test_it_learns_the_shapes(folder, tmp_path):
    """By heart: this shows that images and labels belong together, all the way to the scores."""
    recipe = recipe_of(iterations=60, batch=12, flip=False, color_jitter=False, resize=(36, 36))
    run(recipe, folder, tmp_path)
    metrics = evaluate(tmp_path, folder, "train", progress=False).to_json()
    assert metrics["images"] == 24
    assert metrics["top1_error"] <= 0.25  # guessing: 0.83


def test_scores_are_those_of_the_predictor(trained, folder):
    """Two ways to the same numbers: `evaluate`, and probabilities image by image."""
    out, metrics = trained
    predictor = deformnet.load(out, device="cpu")
    images = ImageFolderClassification(folder, "val")
    places = []
    for i in range(len(images)):
        image, label = images[i]
        probabilities = predictor.predict(torch.as_tensor(image))
        assert probabilities.sum() == pytest.approx(1)
        places.append(int((probabilities > probabilities[label]).sum()))
    assert metrics["top1_error"] == pytest.approx(sum(place > 0 for place in places) / 12)
    assert metrics["top5_error"] == pytest.approx(sum(place > 4 for place in places) / 12)
    again = evaluate(out, folder, "val", hardware=Hardware(workers=1), progress=False)
    assert again.to_json() == metrics


def test_files_of_predictions(trained, folder, tmp_path):
    predictor = deformnet.load(trained[0], device="cpu")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    files = find_images([folder / "val/star", broken])
    results = list(predictor.write(files, tmp_path / "out"))
    assert [one.problem is None for one in results] == [True, True, False]
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [one["image"] for one in predictions] == [file.name for file in files[:2]]
    for one, file in zip(predictions, files, strict=False):
        listed = one["classes"]
        assert len(listed) == 5
        probabilities = [item["probability"] for item in listed]
        assert probabilities == sorted(probabilities, reverse=True)
        image = ImageFolderClassification(folder, "val")
        index = image.samples.index((str(file.path), image.classes.index("star")))
        expected = predictor.predict(torch.as_tensor(image[index][0]))
        for item in listed:
            there = float(expected[predictor.classes.index(item["class"])])
            assert item["probability"] == pytest.approx(there, abs=1e-6)


# The same weights, whatever happens.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_ends_in_equal_weights(trained, folder, tmp_path, workers):
    run_stopped(3, recipe_of(), folder, tmp_path)
    torch.rand(17)  # the random state of the process does not matter
    run(recipe_of(), folder, tmp_path, workers=workers)
    assert_equal_weights(tmp_path, trained[0])


def test_two_processes_are_as_good_as_one(folder, tmp_path):
    recipe = recipe_of(norm="frozen", batch=4, iterations=12, warmup=0, lr=0.002)
    job = {"do": "train", "recipe": recipe.to_dict(), "data": folder, "out": tmp_path / "two"}
    options = {"val_split": "val", "workers": 1}
    process = forked_torchrun([job | {"options": options}], tmp_path, "--nproc-per-node=2")
    one = run(recipe, folder, tmp_path / "one", val_split="val").to_json()
    wait(process)
    losses = curve(tmp_path / "one")
    assert max(losses) - min(losses) > 0.1, "the loss must move for this to show anything"
    assert curve(tmp_path / "two") == pytest.approx(losses, abs=1e-4)
    # 12 images, six for each process: the counts add up.
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    for name in ("images", "top1_error", "top5_error", "class_errors"):
        assert two[name] == one[name]


# Others start from it.


@pytest.mark.parametrize("backbone", ["resnet18", "aligned-inception-resnet"])
def test_deeplab_starts_from_a_classifier(folder, tmp_path, monkeypatch, backbone):
    # One block of each kind instead of up to 22 alike.
    monkeypatch.setattr(aligned_inception_resnet, "_BLOCKS", (2, 2, 2, 2))
    run(recipe_of(backbone=backbone, iterations=2), folder, tmp_path / "run")
    recipe = DeepLabRecipe(backbone=backbone, deform_layers=3, init=str(tmp_path / "run"))
    loaded = recipe.build_model(7).backbone.state_dict()
    stored = weights(tmp_path / "run")
    own = {name for name in loaded if ".conv_offset." not in name and "reduce" not in name}
    assert {f"backbone.{name}" for name in own} == {
        name for name in stored if name.startswith("backbone.")
    }
    for name in own:
        assert torch.equal(loaded[name], stored[f"backbone.{name}"]), name


def test_deeplab_trains_from_a_classifier(trained, shapes, quick, tmp_path):
    changes = {"backbone": "resnet18", "deform_layers": 3, "iterations": 2, "warmup": 100}
    recipe = dataclasses.replace(quick, init=str(trained[0]), **changes, lr=1e-3)
    metrics = run(recipe, shapes, tmp_path / "run", val_split="val").to_json()
    assert 0 <= metrics["mean_iou"] <= 1
    # Two small steps away from where it started, and not from random weights.
    name = "backbone.layer3.0.conv1.weight"
    start, end = weights(trained[0])[name], weights(tmp_path / "run")[name]
    assert 0 < float((end - start).norm() / start.norm()) < 0.01


# Errors.


def test_other_data_and_options_are_refused(trained, folder, shapes, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected folders of classes, but found boxes"):
        run(recipe_of(), shapes, tmp_path)
    options = TaskOptions(augmentation=TestTimeAugmentation(flip=True))
    with pytest.raises(ValueError, match="augmentation does not apply to classifier"):
        evaluate(trained[0], folder, "val", options=options)
    with pytest.raises(ValueError, match="augmentation does not apply to classifier"):
        deformnet.load(trained[0], options=options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 257}, r"crop to be at most the smallest resize \(256\), but got 257"),
        ({"crop": 200, "test_short_side": 199}, r"at most test_short_side \(199\), but got 200"),
        ({"crop": 0}, "expected crop to be positive, but got 0"),
        ({"resize": (400, 300)}, r"resize to be ascending, but got \(400, 300\)"),
        ({"test_short_side": -1}, "expected test_short_side to be positive, but got -1"),
        ({"color_jitter": 1}, "expected color_jitter to be bool, but got 1"),
        ({"resize": 256}, "expected resize to be "),
    ],
)
def test_recipes_that_cannot_be(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ClassifierRecipe(**fields)


def test_the_learning_rate_falls_twice():
    recipe = ClassifierRecipe(iterations=31, warmup=5)
    factors = [recipe.lr_factor(i) for i in range(32)]
    assert factors[:6] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    # 31/3 and 62/3 are not whole: a third has passed after 11, two after 21.
    assert factors[5:11] == [1.0] * 6
    assert factors[11:21] == [0.1] * 10
    assert factors[21:] == [0.01] * 11


# The command line.


def test_from_training_to_predictions(folder, tmp_path, capfd, complaint):
    out = tmp_path / "run"
    command = ["train", "classifier", "--data", str(folder), "--out", str(out)]
    command += ["--recipe", "scratch"]
    command += ["--backbone", "resnet18", "--resize", "32", "40", "--crop", "32", "--batch", "4"]
    command += ["--test-short-side", "32", "--iterations", "1", "--accelerator", "cpu"]
    main([*command, "--workers", "0"])
    capfd.readouterr()
    main(["evaluate", str(out), "--data", str(folder), "--workers", "0", "--accelerator", "cpu"])
    lines = capfd.readouterr().out.splitlines()
    metrics = json.loads((out / "metrics-val.json").read_text())
    assert "Error on val (12 images), percent" in lines
    for name in ("top1", "top5"):
        error = f"{100 * metrics[f'{name}_error']:.1f}"
        assert [f"top-{name[-1]}", error] in [line.split() for line in lines]
    assert any(line.startswith("trefoil ") for line in lines)
    main(["predict", str(out), str(folder / "val/disc"), "--out", str(tmp_path / "out")])
    assert f"2 of 2 images done, results in {tmp_path / 'out'}" in capfd.readouterr().out
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == 2

    message = "expected a detector, which makes proposals, but got classifier"
    assert message in complaint("propose", out, "--data", folder, "--out", "x")
    line = complaint("train", "deeplab", "--data", folder, "--out", tmp_path / "a")
    assert "expected a data set with leftImg8bit" in line
    assert "test: " in complaint("evaluate", out, "--data", folder, "--split", "test")
