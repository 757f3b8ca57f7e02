"""Exported networks in folders and on the Hugging Face Hub, and their model cards."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from hub_server import COMMIT, serving
from huggingface_hub import constants, hub_mixin

import deformnet
from deformnet import UserError
from deformnet._hub import local
from deformnet.cli import main
from deformnet.engine import HubModel, LoopOptions, export_run, load_run, train
from deformnet.engine.model_card import model_card
from deformnet.engine.runs import TrainedRun
from deformnet.recipes import RFCNRecipe

FILES = {"model.safetensors", "model.json", "README.md"}


@pytest.fixture(scope="module")
def run(data, quick, tmp_path_factory):
    """A run folder of DeepLab, with scores on the validation images."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(quick, data, out, loop=LoopOptions(progress=False))
    return out


@pytest.fixture
def folder(run, tmp_path):
    """The exported run in a folder of its own, OWNER/REPO."""
    export_run(run, tmp_path / "hub" / "me" / "cells" / "model.safetensors")
    return tmp_path / "hub" / "me" / "cells"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty download cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(folder, cache, monkeypatch):
    """A server with one repository, me/cells; the value is its folder."""
    with serving(folder.parents[1]) as address:
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield folder


@pytest.fixture
def no_network(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def same(model, other):
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# Model cards.


def test_the_model_card_says_what_the_weights_are(run, folder):
    assert {path.name for path in folder.iterdir()} == FILES
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "deformnet",
        "pipeline_tag": "image-segmentation",
        "tags": ["deformable-convolution"],
    }
    metrics = json.loads((run / "metrics.json").read_text())
    (score,) = metrics["percent"].values()
    recipe, model, identity = load_run(run)
    count = sum(parameter.numel() for parameter in model.parameters())
    for part in (
        f"# deeplab on {recipe.backbone}\n",
        f", deformable layers: {recipe.deform_layers}; {count / 1e6:.2f} M parameters\n",
        f"- Classes ({len(identity.classes)}): {', '.join(identity.classes)}\n",
        f"- Training data: {identity.images} images",
        f"- Training: 6 iterations, batch size 2, sgd, learning rate 0.01, {recipe.schedule} ",
        "- Initial weights: random\n",
        "| split | images | mean IoU |\n|---|---|---|\n",
        f"| val | {metrics['images']} | {score:.2f} |\n",
        'deformnet.load("model.safetensors")',
        "\n## License\n\nNot stated.",
    ):
        assert part in body, part


@pytest.mark.parametrize(
    ("init", "shown"),
    [
        ("/home/me/runs/shapes/last.ckpt", "last.ckpt"),
        ("hf://me/cells", "hf://me/cells"),
        ("timm", "timm"),
    ],
)
def test_the_model_card_names_no_local_folder(run, init, shown):
    recipe, model, identity = load_run(run)
    trained = TrainedRun(dataclasses.replace(recipe, init=init), model, identity)
    assert f"- Initial weights: {shown}\n" in model_card("model.safetensors", trained, {})


def test_scores_are_those_of_each_split(run, data, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    main(["evaluate", str(other), "--data", str(data), "--split", "train", "--workers", "0"])
    card = export_run(other, tmp_path / "net.safetensors")
    rows = [line for line in card.with_suffix(".md").read_text().splitlines() if line[:1] == "|"]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| train", "| val"]
    for path in other.glob("metrics*.json"):
        path.unlink()
    for scores, said in (({}, "None: the run has not been evaluated."), ({"split": "val"}, "See ")):
        (other / "metrics.json").write_text(json.dumps(scores))
        export_run(other, tmp_path / "net.safetensors")
        assert f"\n## Scores\n\n{said}" in card.with_suffix(".md").read_text()


def test_an_edited_model_card_is_kept(run, folder):
    words = folder / "README.md"
    written = words.read_text()
    words.write_text(edited := written.replace("---\n", "---\nlicense: mit\n", 1))
    message = r"README\.md: kept, because it has been edited; delete it and export again"
    for _ in range(2):
        with pytest.warns(UserWarning, match=message):
            export_run(run, folder / "model.safetensors")
        assert words.read_text() == edited
    words.unlink()
    export_run(run, folder / "model.safetensors")
    assert words.read_text() == written


def test_names_are_shown_as_text(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    path = other / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    names = list(content["deformnet"]["data"]["classes"])
    content["deformnet"]["data"]["classes"] = ["a\n# b", "<b>|`c`", *names[2:]]
    torch.save(content, path)
    (other / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
    card = export_run(other, tmp_path / "net.safetensors")
    line = f"({len(names)}): a # b, &lt;b&gt;&#124;&#96;c&#96;, "
    assert line in card.with_suffix(".md").read_text()


# Folders.


def test_a_folder_takes_the_place_of_a_run(run, folder, data, tmp_path):
    image = next(data.rglob("*.jpg"))
    labels = deformnet.load(run)(image).labels
    assert torch.equal(deformnet.load(folder)(image).labels, labels)
    main(["predict", str(folder), str(image), "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out" / "labels").rglob("*.png"))) == 1
    trained = load_run(run).model.state_dict()
    model = RFCNRecipe(backbone="timm/test_resnet", deform_layers=1, init=str(folder)).build_model(
        3
    )
    name = "backbone.trunk.conv1.0.weight"
    assert torch.equal(model.state_dict()[name], trained[name])


def test_an_export_does_not_replace_its_input(folder):
    """The card would lose its scores."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="expected a new path for the result, but got the input"):
        export_run(folder, folder / "model.safetensors")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_folder_stays_one(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    (other / "model.safetensors").write_bytes(b"another export")
    assert same(load_run(other).model, load_run(run).model)


def test_saving_and_loading_with_the_mixin(run, folder, tmp_path):
    model = HubModel(run)
    assert model.save_pretrained(tmp_path / "saved") is None
    assert {path.name for path in (tmp_path / "saved").iterdir()} == FILES
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    loaded = HubModel.from_pretrained(tmp_path / "saved")
    assert same(loaded.trained.model, model.trained.model)
    assert loaded.predictor("cpu").classes == model.trained.data.classes
    loaded.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_pushing(run, folder, tmp_path, monkeypatch):
    class Api:
        def __init__(self, token):
            assert token == "t"

        def create_repo(self, repo_id, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message, **_):
            shutil.copytree(folder_path, tmp_path / "remote" / repo_id)
            return commit_message

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    done = HubModel(run).push_to_hub("me/cells", private=True, token="t", commit_message="one")
    assert done == "one"
    remote = tmp_path / "remote/me/cells"
    assert {path.name for path in remote.iterdir()} == FILES
    for name in ("model.safetensors", "README.md"):
        assert (remote / name).read_bytes() == (folder / name).read_bytes()


# Addresses.


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}", "@refs/pr/2"])
def test_loading_from_the_hub(revision, run, hub, cache):
    address = f"hf://me/cells{revision}"
    assert same(load_run(address).model, load_run(run).model)
    assert local(address) == local(Path(address))
    assert local(address).is_relative_to(cache)


def test_commands_take_addresses(run, hub, data, tmp_path, capsys):
    image = next(data.rglob("*.jpg"))
    main(["predict", "hf://me/cells", str(image), "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out" / "labels").rglob("*.png"))) == 1
    arguments = ["--data", str(data), "--out", str(tmp_path / "run"), "--init", "hf://me/cells"]
    short = ["--iterations", "1", "--batch", "2", "--norm", "trained", "--short-side", "32"]
    main(["train", "deeplab", *arguments, *short, "--workers", "0", "--val-split", "None"])
    assert "initial weights: hf://me/cells, backbone and head: " in capsys.readouterr().out
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    assert (recipe["backbone"], recipe["init"]) == ("timm/test_resnet", "hf://me/cells")


def test_a_download_is_kept(run, hub, monkeypatch):
    load_run("hf://me/cells")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(HubModel.from_pretrained("me/cells").trained.model, load_run(run).model)
    with pytest.raises(OSError, match=r"hf://me/cells@v2: cannot download model\.json "):
        load_run("hf://me/cells@v2")


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://me", "hf://me/cells/best", "hf://me/cells@", "hf://me/c ells", "hf:/me@v1"],
)
def test_malformed_addresses(address):
    message = "expected hf://OWNER/REPO or hf://OWNER/REPO@REVISION, but got hf://"
    with pytest.raises(UserError, match=message):
        load_run(address)


def test_a_name_that_the_hub_does_not_allow(cache):
    with pytest.raises(UserError, match="hf://me/-cells: expected OWNER/REPO, but got me/-cells"):
        load_run("hf://me/-cells")


def test_what_the_hub_does_not_have(hub):
    message = "hf://me/dogs: expected a repository that you can read, but found none; check"
    with pytest.raises(FileNotFoundError, match=message):
        load_run("hf://me/dogs")
    message = "hf://me/cells@v3: expected a branch, tag or commit, but found no v3; omit @v3"
    with pytest.raises(FileNotFoundError, match=message):
        load_run("hf://me/cells@v3")
    for name in ("model.safetensors", "model.json"):
        (hub / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"hf://me/cells: expected {name}, as written"):
            load_run("hf://me/cells")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda old: old[:-1] + b"x", "damaged, expected the sha256 "),
        ("model.safetensors", lambda old: old[:-9], "damaged, expected the sha256 "),
        ("model.json", lambda old: old[:-9], "not readable as JSON"),
        (
            "model.json",
            lambda old: b"[]",
            "expected the card of an exported run, but got a damaged or another file",
        ),
    ],
)
def test_damaged_downloads(name, damage, message, run, hub, cache):
    intact = (hub / name).read_bytes()
    (hub / name).write_bytes(damage(intact))
    with pytest.raises(UserError, match=message) as error:
        load_run("hf://me/cells")
    text = str(error.value)
    assert text.startswith(f"hf://me/cells: {cache}")
    (hub / name).write_bytes(intact)
    # The command in the message helps.
    folder = text.partition("; delete ")[2].removesuffix(" to download it again")
    shutil.rmtree(folder)
    assert same(load_run("hf://me/cells").model, load_run(run).model)


def test_no_network(no_network, data, complaint, tmp_path):
    message = r"hf://me/cells: cannot download model\.json \(.*offline mode.*\), and it is not in "
    with pytest.raises(OSError, match=message):
        HubModel.from_pretrained("me/cells")
    line = complaint("predict", "hf://me/cells", next(data.rglob("*.jpg")), "--out", tmp_path / "o")
    assert line.endswith("or pass the path of a local copy of the repository")


def test_a_download_that_breaks_off(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("peer closed connection\n(more)")  # the type depends on the version

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(OSError, match=r"hf://me/cells: .* model\.json \(peer closed connection\),"):
        load_run("hf://me/cells")


def test_a_wait_for_another_download_is_logged(hub, cache, monkeypatch, caplog):
    """Another process holds huggingface_hub's lock."""
    monkeypatch.setattr("deformnet._hub._PATIENCE", 0.05)
    content = (hub / "model.json").read_bytes()
    lock = cache / ".locks/models--me--cells" / f"{hashlib.sha256(content).hexdigest()}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        release = threading.Timer(0.5, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        load_run("hf://me/cells")
        release.join()
    assert caplog.messages[0].startswith(
        "the download of hf://me/cells, here or in another process, has taken "
    )


def test_commands_that_need_a_run_folder(data, tmp_path, complaint):
    line = complaint("evaluate", "hf://me/cells", "--data", data)
    message = "expected a run folder to write the scores to, but got an hf:// URI"
    assert line == f"hf://me/cells: {message}"
    line = complaint("export", "hf://me/cells", tmp_path / "net.safetensors")
    assert line == "hf://me/cells: expected a run folder, but got an hf:// URI"


def test_a_missing_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, package=None: None if name == "huggingface_hub" else found(name, package),
    )
    with pytest.raises(ImportError, match=r"hf:// needs huggingface_hub, .*deformnet\[models\]"):
        load_run("hf://me/cells")
