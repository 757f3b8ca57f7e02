"""Detectors from folder to folder: training, resuming, stored proposals, scores, bad input."""

import itertools
import json
import shutil

import pytest
import torch
from processes import CPU, assert_equal_weights, run, run_stopped, small
from safetensors.torch import load_file, save_file
from torchvision import tv_tensors
from torchvision.ops import box_iou

import deformnet
from deformnet.data.boxes import BoxAnnotations
from deformnet.data.opening import open_detection
from deformnet.engine import evaluate, load_run, propose
from deformnet.engine.logs import read_log
from deformnet.engine.runs import checkpoint_path, iterations_done
from deformnet.metrics.detections import read_detections
from deformnet.models import RFCN, Target
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    RPNRecipe,
    TestTimeAugmentation,
)
from deformnet.tasks import TaskOptions
from deformnet.tasks.detection.data import DetectionTrainingSet, Sample, collate, to_whole_pixels
from deformnet.tasks.proposals import StoredProposals
from deformnet.tasks.scoring import score

NETWORKS = (RPNRecipe, ClassAwareRPNRecipe, FasterRCNNRecipe, RFCNRecipe)


def quick(network, **changes):
    """The smallest recipe, on images of 48 x 58 pixels."""
    values = {"norm": "trained", "short_side": 48, "batch": 2, "iterations": 4}
    layers = 0 if network is RPNRecipe else 3
    return small(network, **values | {"max_detections": 10, "deform_layers": layers} | changes)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_detector_trains_and_is_scored(shapes, tmp_path, network):
    recipe = quick(network, backbone="resnet18")
    metrics = run(recipe, shapes, tmp_path, val_split="val").to_json()
    assert metrics["network"] == recipe.network
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    rows = read_log(tmp_path / "metrics.csv")
    others = {"iteration", "learning_rate", "seconds", "data_fraction"}
    terms = [name for name in rows[0] if name not in others]
    two_stages = network in (FasterRCNNRecipe, RFCNRecipe)
    assert terms == ["loss", "rpn_class", "rpn_box", *(["class", "box"] if two_stages else [])]
    for row in rows:
        parts = sum(float(row[name]) for name in terms[1:])
        assert float(row["loss"]) == pytest.approx(parts, abs=1e-5)
    records = read_detections(tmp_path / "detections.jsonl")
    assert len(records) == metrics["images"] == 3
    if network is RPNRecipe:
        assert set(metrics["recall"]) == {"0.5", "0.7"}
        assert {name for record in records for name in record.classes} == {"object"}
    else:
        # The file alone gives the same numbers.
        again = score(tmp_path / "detections.jsonl", shapes, split="val").json
        assert metrics["voc"]["area"] == again["voc"]["area"]
        assert metrics["detections"] > 0
    torch.manual_seed(recipe.seed)
    start = recipe.build_model(6).state_dict()
    end = load_run(tmp_path).model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    if network is not RPNRecipe:
        assert "backbone.layer4.1.conv2.conv_offset.weight" in moved
    assert "backbone.conv1.weight" in moved


@pytest.mark.parametrize("network", [ClassAwareRPNRecipe, RFCNRecipe])
def test_a_stopped_run_ends_in_equal_weights(shapes, tmp_path, network):
    recipe = quick(network, iterations=5)
    run(recipe, shapes, tmp_path / "whole")
    run_stopped(3, recipe, shapes, tmp_path / "broken")
    torch.rand(17)  # the random state of the process does not matter
    run(recipe, shapes, tmp_path / "broken")
    assert_equal_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.fixture(scope="module")
def stored(shapes, tmp_path_factory):
    """Proposals of both splits, from a region proposal network."""
    folder = tmp_path_factory.mktemp("proposals")
    run(quick(RPNRecipe, iterations=1), shapes, folder / "rpn")
    for split, count in (("train", 7), ("val", 3)):
        out = folder / f"{split}.safetensors"
        assert propose(folder / "rpn", shapes, split, out, hardware=CPU, progress=False) == count
    return folder


def test_training_on_stored_proposals(shapes, stored, tmp_path):
    files = [stored / "train.safetensors", stored / "val.safetensors"]
    recipe = quick(RFCNRecipe)
    metrics = run(recipe, shapes, tmp_path, val_split="val", proposals=files).to_json()
    columns = read_log(tmp_path / "metrics.csv")[0]
    others = {"iteration", "learning_rate", "seconds", "data_fraction"}
    assert set(columns) == {"loss", "class", "box", *others}
    torch.manual_seed(recipe.seed)
    start, end = recipe.build_model(6).state_dict(), load_run(tmp_path).model.state_dict()
    for name in start:
        if name.startswith("rpn."):
            assert torch.equal(start[name], end[name]), name
    assert not torch.equal(start["score_maps.weight"], end["score_maps.weight"])

    def evaluated(**options):
        options = TaskOptions(**options)
        return evaluate(tmp_path, shapes, "val", options=options, hardware=CPU, progress=False)

    again = evaluated(proposals=tuple(files[1:])).to_json()
    assert again["voc"] == metrics["voc"]
    assert "augmentation" not in again
    flip = TestTimeAugmentation(flip=True)
    flipped = evaluated(augmentation=flip, proposals=tuple(files[1:]))
    assert flipped.to_json()["augmentation"]["flip"] is True
    assert "test-time augmentation: flip True" in str(flipped)
    with pytest.raises(ValueError, match=r"expected stored proposals .* trained on stored"):
        evaluated()
    with pytest.raises(ValueError, match="it was trained on stored ones"):
        deformnet.load(tmp_path)
    with pytest.raises(ValueError, match=r"on the same data .*, but it holds one on other data"):
        run(recipe, shapes, tmp_path)


def test_stored_proposals_that_do_not_fit(shapes, stored, tmp_path):
    train_file, val_file = stored / "train.safetensors", stored / "val.safetensors"
    with pytest.raises(ValueError, match=r"val\.safetensors: expected proposals for image train_"):
        run(quick(RFCNRecipe), shapes, tmp_path, proposals=[val_file])
    with pytest.raises(ValueError, match=r"proposals .*class-aware-rpn"):
        run(quick(ClassAwareRPNRecipe), shapes, tmp_path, proposals=[train_file])
    with pytest.raises(FileNotFoundError, match="no such file of proposals"):
        StoredProposals([tmp_path / "none"])
    with pytest.raises(ValueError, match="expected images without proposals so far, but"):
        StoredProposals([train_file, train_file])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(train_file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged, or not a safetensors file"):
        StoredProposals([cut])
    content = load_file(val_file)
    names = {"names": json.dumps(["a", "b", "c"])}
    count = len(content["boxes"])
    for changed in (
        {"starts": torch.zeros(0, dtype=torch.int64)},
        {"starts": torch.tensor(count)},
        {"starts": torch.tensor([0, count, 0, count])},
        {"starts": torch.tensor([1, 1, 1, count])},
        {"starts": torch.tensor([0, 0, 0, count + 1])},
        {"starts": torch.tensor([0.0, 0, 0, count])},
        {"boxes": content["boxes"].double()},
        {"boxes": content["boxes"] * torch.nan},
    ):
        save_file(content | changed, cut, names)
        with pytest.raises(ValueError, match=r"cut\.safetensors: damaged"):
            StoredProposals([cut])


def test_stored_proposals_of_an_image_are_sent_alone(shapes, stored):
    """Loader processes send the whole storage of a tensor, even of a small part."""
    proposals = StoredProposals([stored / "train.safetensors"])
    images = open_detection(shapes, "train")
    for index in range(len(images)):
        boxes = proposals[images.name(index)]
        assert boxes.untyped_storage().nbytes() == boxes.numel() * 4


def test_the_order_of_the_files_does_not_matter(stored):
    files = [stored / "train.safetensors", stored / "val.safetensors"]
    assert StoredProposals(files).digest == StoredProposals(files[::-1]).digest
    assert StoredProposals(files).digest != StoredProposals(files[:1]).digest


def test_stored_proposals_follow_the_image(shapes, tmp_path):
    """One proposal for each image, its first object: after the transforms both are still equal."""
    images = open_detection(shapes, "train")

    class FirstObject:
        digest = ""

        def __getitem__(self, name):
            index = [images.name(i) for i in range(len(images))].index(name)
            objects = images.annotations(index)
            return objects.boxes.as_subclass(torch.Tensor)[~objects.ignored][:1]

    recipe = quick(RFCNRecipe, short_side=96)
    training_set = DetectionTrainingSet(recipe, images, FirstObject())
    for index in range(len(images)):
        torch.manual_seed(index)  # some are flipped
        sample = training_set.sample(index)
        if len(sample.target.boxes):
            assert torch.equal(sample.proposals, sample.target.boxes[:1])
            size = sample.image.shape
            assert min(size[1:]) == 96
            assert sample.proposals.amax() > 1


def test_recall_is_that_of_the_proposals(shapes, tmp_path):
    """All of them, and not those that would be left of detections."""
    recipe = quick(RPNRecipe, iterations=1, nms=0.1, score_threshold=0.6)
    metrics = run(recipe, shapes, tmp_path, val_split="val").to_json()
    out = tmp_path / "val.safetensors"
    propose(tmp_path, shapes, "val", out, hardware=CPU, progress=False)
    stored, images = StoredProposals([out]), open_detection(shapes, "val")
    records = {record.image: record for record in read_detections(tmp_path / "detections.jsonl")}
    best = []
    for index in range(len(images)):
        name = images.name(index)
        assert len(stored[name]) == 20
        torch.testing.assert_close(torch.from_numpy(records[name].boxes), stored[name])
        objects = images.annotations(index).boxes.as_subclass(torch.Tensor)
        best.extend(box_iou(objects, stored[name]).amax(dim=1).tolist())
    for iou in (0.5, 0.7):
        fraction = sum(value >= iou for value in best) / len(best)
        assert metrics["recall"][str(iou)] == pytest.approx(fraction)


def test_images_without_objects_train(shapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for file in (data / "VOCdevkit/VOC2012/Annotations").glob("*.xml"):
        if file.stem == "train_000000":  # a set without any is refused
            continue
        text = file.read_text()
        file.write_text(text[: text.index("<object>")] + "</annotation>")
    for network in NETWORKS:
        out = tmp_path / network.network
        recipe = quick(network, batch=1, iterations=3, deform_layers=0)
        metrics = run(recipe, data, out, val_split="val").to_json()
        if network is RPNRecipe:
            assert metrics["recall"] == {"0.5": None, "0.7": None}
        else:
            assert metrics["voc"]["area"]["mean_ap"] == {"0.5": None, "0.7": None}
        empty = [row for row in read_log(out / "metrics.csv") if float(row["rpn_box"]) == 0]
        assert len(empty) >= 2
        for row in empty:
            assert float(row.get("box", 0)) == 0
            assert float(row["rpn_class"]) > 0


@pytest.mark.parametrize("term", ["rpn_box", "class"])
def test_a_loss_that_becomes_nan_stops_with_its_name(shapes, tmp_path, monkeypatch, term):
    losses, calls = RFCN.losses, itertools.count(1)

    def poisoned(self, *arguments):
        terms = losses(self, *arguments)
        return terms | {term: terms[term] * torch.nan} if next(calls) == 4 else terms

    monkeypatch.setattr(RFCN, "losses", poisoned)
    with pytest.raises(FloatingPointError) as caught:
        run(quick(RFCNRecipe), shapes, tmp_path, checkpoint_every=2)
    message = str(caught.value)
    assert f"the {term} loss is nan in iteration 4" in message
    assert f"the last checkpoint is that of iteration 2, {checkpoint_path(tmp_path)}" in message
    assert iterations_done(tmp_path) == 2


def test_the_authors_convention_rounds_objects():
    # First and last pixels: 1.4 -> 1, 1.6 -> 2; never narrower than a pixel.
    boxes = torch.tensor([[1.4, 1.6, 5.4, 5.6], [3.4, 0.0, 3.6, 1.0]])
    assert to_whole_pixels(boxes).tolist() == [[1, 2, 5, 6], [3, 0, 4, 1]]


def test_a_batch_of_different_sizes():
    def sample(height, width, objects, proposals):
        target = Target(torch.rand(objects, 4), torch.zeros(objects, dtype=torch.int64))
        image, size = torch.ones(3, height, width), (height, width)
        return Sample(image, size, target, proposals, seed=objects)

    batch = collate([sample(2, 3, 2, None), sample(1, 5, 0, None)])
    assert batch.images.shape == (2, 3, 2, 5)
    assert batch.images[0, :, :, 3:].eq(0).all()
    assert batch.images[1, :, 1:].eq(0).all()
    assert batch.images.sum() == 3 * (6 + 5)
    assert batch.sizes == [(2, 3), (1, 5)]
    assert [len(target.boxes) for target in batch.targets] == [2, 0]
    assert batch.proposals is None
    assert batch.seeds == [2, 0]
    larger = batch.padded(4, 6)
    assert larger.images.shape == (2, 3, 4, 6)
    assert torch.equal(larger.images[:, :, :2, :5], batch.images)
    assert larger.images.sum() == batch.images.sum()
    given = collate([sample(2, 2, 0, torch.ones(3, 4)), sample(2, 2, 0, torch.ones(0, 4))])
    assert [len(boxes) for boxes in given.proposals] == [3, 0]


def test_difficult_objects_do_not_train(shapes, monkeypatch):
    objects = BoxAnnotations(
        tv_tensors.BoundingBoxes(
            torch.tensor([[1.0, 1, 20, 20], [5, 5, 30, 30]]), format="XYXY", canvas_size=(40, 48)
        ),
        torch.tensor([0, 1]),
        torch.tensor([True, False]),
    )
    image = tv_tensors.Image(torch.zeros(3, 40, 48, dtype=torch.uint8))
    recipe = quick(RFCNRecipe, short_side=40, flip=False)
    training_set = DetectionTrainingSet(recipe, open_detection(shapes, "train"), None)
    monkeypatch.setattr(training_set, "_images", [(image, objects)])
    sample = training_set.sample(0)
    assert sample.target.labels.tolist() == [1]
    assert sample.target.boxes.tolist() == [[5, 5, 30, 30]]
