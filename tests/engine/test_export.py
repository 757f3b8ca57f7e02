"""Trained networks as files: exported runs, their cards, and runs as starting weights."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deformnet.engine.runs
from deformnet.cli import main
from deformnet.engine import export_run, load_run
from deformnet.models.backbones import backbone
from deformnet.models.backbones.weights import read_weights
from deformnet.recipes import DeepLabRecipe, RFCNRecipe

QUICK = [
    *("--recipe", "scratch"),
    *("--backbone", "resnet18", "--deform-layers", "1", "--short-side", "32", "--max-side", "None"),
    *("--batch", "2", "--iterations", "2", "--accelerator", "cpu", "--workers", "0"),
]
FILES = {"net.safetensors", "net.json", "net.md"}


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run folder of DeepLab on ResNet-18, with scores on both lists."""
    out = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "deeplab", "--data", str(shapes), "--out", str(out), *QUICK])
    main(["evaluate", str(out), "--data", str(shapes), "--split", "train", "--workers", "0"])
    return out


@pytest.fixture
def exported(run, tmp_path):
    """The exported run, to be damaged."""
    export_run(run, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def picture(shapes):
    return sorted((shapes / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))[0]


def test_export(run, shapes, tmp_path, capsys):
    out = tmp_path / "kept" / "net.safetensors"
    main(["export", str(run), str(out)])
    written = f"weights in {out}, description in {out.parent}/net.json and {out.parent}/net.md\n"
    assert capsys.readouterr().out == written
    assert {path.name for path in out.parent.iterdir()} == FILES
    checkpoint, state = weights(run), load_file(out)
    assert set(state) == set(checkpoint)
    for name, tensor in state.items():
        assert torch.equal(tensor, checkpoint[name]), name
    card = json.loads((out.parent / "net.json").read_text())
    assert card["weights"] == "net.safetensors"
    assert card["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert card["recipe"] == json.loads((run / "recipe.json").read_text())
    assert card["data"]["images"] == 7
    assert card["data"]["classes"] == list(load_run(run).data.classes)
    assert len(card["data"]["digest"]) == 64
    assert set(card["metrics"]) == {"metrics.json", "metrics-train.json"}
    for name, metrics in card["metrics"].items():
        assert metrics == json.loads((run / name).read_text())
    assert card["versions"]["trained"] == card["metrics"]["metrics.json"]["versions"]
    assert card["versions"]["exported"] == deformnet.engine.runs.versions()


def test_an_exported_run_is_the_run(run, exported):
    recipe, model, data = load_run(exported)
    own_recipe, own_model, own_data = load_run(run)
    assert (recipe, data) == (own_recipe, own_data)
    assert not model.training
    for name, tensor in own_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_predicting_with_an_exported_run(run, exported, shapes, tmp_path):
    for source, out in ((run, "a"), (exported, "b")):
        main(["predict", str(source), str(picture(shapes)), "--out", str(tmp_path / out)])
    name = f"labels/{picture(shapes).stem}.png"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("source", ["run", "exported"])
def test_starting_from_a_run(source, request, run, shapes, tmp_path):
    path = request.getfixturevalue(source)
    trained = load_run(run).model.state_dict()
    # Another network: it takes the backbone alone, and none of the channel reduction.
    recipe = RFCNRecipe(backbone="resnet18", deform_layers=1, init=str(path))
    torch.manual_seed(0)
    model = recipe.build_model(3).state_dict()
    for name, tensor in model.items():
        if name.startswith("backbone.") and not name.startswith("backbone.reduce."):
            assert torch.equal(tensor, trained[name]), name
    assert not torch.equal(model["backbone.reduce.weight"], trained["backbone.reduce.weight"])
    assert set(read_weights(path)) == {
        name.removeprefix("backbone.")
        for name in trained
        if name.startswith("backbone.") and not name.startswith("backbone.reduce.")
    }


@pytest.mark.parametrize("source", ["run", "exported"])
def test_starting_from_a_run_on_another_backbone(source, request):
    path = request.getfixturevalue(source)
    with pytest.raises(
        ValueError, match="expected weights of ResNet-50, but got ResNet-18: "
    ) as error:
        backbone("resnet50", weights=path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match="expected weights of Aligned-Inception-ResNet, but got ResNet-18: "
    ):
        backbone("aligned-inception-resnet", weights=path)
    with pytest.raises(ValueError, match=r"ResNet-18.*: unexpected key .*conv_"):
        backbone("resnet18", weights=path)


def test_training_from_a_run_on_another_backbone(run, shapes, tmp_path, complaint):
    arguments = ["--data", shapes, "--out", tmp_path / "out", *QUICK, "--init", run]
    line = complaint("train", "deeplab", *arguments, "--backbone", "resnet34")
    assert f"{run}: expected weights of ResNet-34, but got ResNet-18: " in line


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"no weights at all")


@pytest.mark.parametrize("damage", [cut, emptied, overwritten])
@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.pth", "a.safetensors.partial", "a.pth.partial"]
)
def test_damaged_weights(damage, name, tmp_path):
    path = tmp_path / name
    state = backbone("resnet18").state_dict()
    if "safetensors" in name:
        save_file(state, path)
    else:
        torch.save(state, path)
    damage(path)
    with pytest.raises(ValueError, match=r": damaged, or not a (Py|safe)") as error:
        backbone("resnet18", weights=path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_as_safetensors(tmp_path):
    model = backbone("resnet18")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    again = backbone("resnet18", weights=tmp_path / "a.safetensors")
    assert torch.equal(again.conv1.weight, model.conv1.weight)


def test_a_run_that_was_only_begun(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.partial").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="expected a trained run, but found no checkpoints"):
        backbone("resnet18", weights=tmp_path)


# What can be wrong with a card and its weights.


def edited(**changes):
    return lambda card: card.write_text(json.dumps(json.loads(card.read_text()) | changes))


def other_weights(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (".json", Path.unlink, "net.safetensors: its card net.json is not beside it"),
        (".json", cut, "net.json: not readable as JSON"),
        (
            ".json",
            lambda card: card.write_text("[]"),
            "net.json: expected the card of an exported run, but got a damaged or another file",
        ),
        (
            ".json",
            edited(data=None),
            "net.json: expected the card of an exported run, but got a damaged or another file",
        ),
        (
            ".json",
            edited(recipe={"network": "deeplab", "colors": 3}),
            "net.json: expected fields of a deeplab recipe",
        ),
        (
            ".json",
            edited(recipe=DeepLabRecipe(backbone="resnet34").to_dict()),
            "net.safetensors: does not fit the network of its recipe",
        ),
        (".safetensors", other_weights, "not the weights of its card: expected the sha256 "),
        (".safetensors", emptied, "of net.json, but got e3b0c44298fc..."),
    ],
)
def test_damaged_exports(file, damage, message, exported, shapes, tmp_path, complaint):
    damage(exported.with_suffix(file))
    line = complaint("predict", exported, picture(shapes), "--out", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done(run, exported, shapes, tmp_path, complaint):
    line = complaint("evaluate", exported, "--data", shapes)
    assert line == f"{exported}: expected a run folder to write the scores to, but got a file"
    line = complaint("export", run, tmp_path / "net.pth")
    expected = "NAME.safetensors, NAME.onnx or NAME.pt2"
    assert line == f"out: expected {expected}, but got {tmp_path}/net.pth"
    line = complaint("export", exported, tmp_path / "again.safetensors")
    assert line == f"{exported}: expected a run folder, but got a file"
    line = complaint("export", tmp_path / "nothing", tmp_path / "again.safetensors")
    assert line == f"{tmp_path}/nothing: no such run folder"
    line = complaint("predict", tmp_path / "no.safetensors", picture(shapes), "--out", tmp_path)
    assert line == f"{tmp_path}/no.safetensors: no such run folder"


def test_a_run_that_has_not_ended(run, tmp_path):
    begun = Path(shutil.copytree(run, tmp_path / "begun"))
    for path in begun.glob("metrics*.json"):
        path.unlink()
    card = json.loads(export_run(begun, tmp_path / "net.safetensors").read_text())
    assert card["metrics"] == {}
    assert card["versions"]["trained"] is None
    (begun / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json: not readable as JSON"):
        export_run(begun, tmp_path / "net.safetensors")


def test_an_export_that_fails_leaves_the_old_one(exported, run, monkeypatch):
    before = exported.read_bytes()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deformnet._files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(run, exported)
    assert exported.read_bytes() == before
    assert {path.name for path in exported.parent.iterdir()} == FILES
    load_run(exported)


def test_the_file_says_what_it_is(exported):
    with safe_open(exported, framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata.pop("sha256")) == 64
    assert metadata == {"format": "pt", "deformnet": "deeplab"}


# The commit of the code.


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout that looks like deformnet's, with the package in src."""
    package = tmp_path / "src" / "deformnet"
    package.mkdir(parents=True)
    (package / "layers.py").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "deformnet"\n')
    monkeypatch.setattr(deformnet.engine.runs, "_PACKAGE", package)
    return tmp_path


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(root):
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    return git(root, "rev-parse", "HEAD")


def test_commit_of_a_checkout(checkout):
    assert deformnet.engine.runs.versions()["commit"] is None
    head = commit(checkout)
    assert deformnet.engine.runs.versions()["commit"] == head
    (checkout / "notes.txt").write_text("not code")
    assert deformnet.engine.runs.versions()["commit"] == head
    (checkout / "src" / "deformnet" / "new.py").write_text("")
    assert deformnet.engine.runs.versions()["commit"] == f"{head}-dirty"


def test_no_commit_of_somebody_elses_checkout(checkout, monkeypatch):
    commit(checkout)
    (checkout / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    assert deformnet.engine.runs.versions()["commit"] is None
    installed = checkout / "venv" / "site-packages" / "deformnet"
    installed.mkdir(parents=True)
    monkeypatch.setattr(deformnet.engine.runs, "_PACKAGE", installed)
    assert deformnet.engine.runs.versions()["commit"] is None


def test_no_commit_without_git(checkout, monkeypatch):
    commit(checkout)
    monkeypatch.setenv("PATH", str(checkout))
    assert deformnet.engine.runs.versions()["commit"] is None
