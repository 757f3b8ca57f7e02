"""Training on the kept features of a frozen backbone."""

import copy
import dataclasses
import itertools
import json
import logging
import resource
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from processes import CPU as ALONE
from processes import (
    assert_equal_weights,
    curve,
    forked_torchrun,
    run,
    run_stopped,
    small,
    wait,
)
from torch.utils.data import Dataset

from deformnet import UserError
from deformnet.data.opening import open_segmentation
from deformnet.engine import TrainingStopped, evaluate
from deformnet.engine.evaluation import require_frozen
from deformnet.models.backbones import backbone
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    RPNRecipe,
)
from deformnet.tasks import features, masks, task_of
from deformnet.tasks.base import Processes
from deformnet.tasks.features import FeatureCache
from small_sets import one_line

TWO = (DeepLabRecipe, RFCNRecipe)
NETWORKS = (DeepLabRecipe, RPNRecipe, ClassAwareRPNRecipe, FasterRCNNRecipe, RFCNRecipe)
CPU = torch.device("cpu")
HALF = 2e-3  # relative, of a loss on features in half precision


def frozen(network, **changes):
    values = {"backbone": "timm/test_resnet", "freeze": 5, "deform_layers": 0, "iterations": 3}
    return small(network, **values | changes)


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """A finished DeepLab run on its cache."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = frozen(DeepLabRecipe)
    run(recipe, data, folder / "run", val_split="val", feature_cache=folder / "cache")
    return recipe, folder / "run", folder / "cache"


class Rounded:
    """The features that a cache should return, computed directly."""

    def __init__(self, model, images):
        self.backbone, self.images = copy.deepcopy(model.backbone).eval(), images

    def size(self, index):
        return tuple(self.images.input(index).shape[1:])

    def read(self, index, *, flipped):
        image = self.images.input(index)
        image = (image.flip(-1) if flipped else image)[None]
        with torch.no_grad():
            return self.backbone.maps(image.contiguous(memory_format=torch.channels_last))[0].half()


def files(cache):
    return sorted(cache.rglob("*.safetensors"))


@pytest.fixture
def lines(caplog):
    """The lines of the log that are about features."""
    caplog.set_level(logging.INFO, logger="deformnet")
    return lambda: [text for text in caplog.messages if "features" in text]


@pytest.mark.parametrize(
    ("network", "neck", "changes"),
    [
        *((network, "none", {}) for network in NETWORKS),
        *((network, "residual", {}) for network in TWO),
        (DeepLabRecipe, "none", {"output_stride": 8}),
    ],
)
def test_losses_are_those_without_a_cache(network, neck, changes, data, tmp_path):
    """In batches of images of all sizes."""
    recipe = frozen(
        network,
        backbone="resnet18",  # random weights, whose features are large enough to matter
        neck=neck,
        deform_layers=2 if neck == "residual" else 0,
        **({"bins": 3} if network in (FasterRCNNRecipe, RFCNRecipe) else {}),
        **changes,
    )
    images = task_of(recipe).training_set(data, "train")
    torch.manual_seed(0)
    model = recipe.build_model(len(images.classes))
    with torch.no_grad():  # the initial heads are too small for the losses to depend on features
        for weight in (it for it in model.parameters() if it.requires_grad):
            weight.mul_(5)
    stored = FeatureCache(tmp_path, model.backbone, CPU).filled(images, True, Processes())
    model.train()

    def losses(kept, indices, seed):
        images.features = kept
        batch = images.batch(indices, range(seed, seed + len(indices)))
        return {name: loss.item() for name, loss in batch.losses(model).items()}

    for indices, seed in (([0, 1, 2, 3], 0), ([4, 5, 6], 9), ([6], 99)):
        expected, found = losses(None, indices, seed), losses(stored, indices, seed)
        assert found == pytest.approx(losses(Rounded(model, images), indices, seed), rel=1e-5)
        if network not in (FasterRCNNRecipe, RFCNRecipe):  # rounding can choose other proposals
            assert found == pytest.approx(expected, rel=HALF, abs=1e-4)
    assert losses(stored, [5], 99) != pytest.approx(expected, rel=2 * HALF, abs=1e-3)


@pytest.mark.parametrize("flip", [True, False])
def test_masks_are_those_without_a_cache(flip, data, tmp_path):
    """Resized and flipped alike, also where they are read again and where nothing more is kept."""
    recipe = frozen(DeepLabRecipe, short_side=40, flip=flip)
    images = task_of(recipe).training_set(data, "train")
    backbone = recipe.build_model(len(images.classes)).backbone
    stored = FeatureCache(tmp_path, backbone, CPU).filled(images, flip, Processes())
    flips = set()
    for seed in range(4):
        indices, seeds = range(len(images)), range(seed, seed + len(images))
        images.features = None
        expected = images.batch(indices, seeds).masks
        images.features = stored
        found = images.batch(indices, seeds).masks
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), expected)
        flips.add(found.numpy().tobytes())
    assert len(flips) > 1 if flip else len(flips) == 1


def test_masks_beyond_the_limit_are_read_again(monkeypatch):
    monkeypatch.setattr(masks, "_MOST_BYTES", 1)
    read = Mock(side_effect=lambda index: torch.full((2, 3), index, dtype=torch.uint8))
    kept = masks.KeptMasks(read)
    for index in (4, 4, 5, 5):
        assert torch.equal(kept[index], torch.full((2, 3), index, dtype=torch.uint8))
    assert [call.args for call in read.call_args_list] == [(4,), (5,), (5,)]
    kept[4][:] = 0  # a copy
    assert kept[4].eq(4).all()


def test_training_and_scores_are_those_without_a_cache(data, tmp_path, lines):
    recipe = frozen(DeepLabRecipe, neck="residual", deform_layers=2, lr=0.05)
    run(recipe, data, tmp_path / "computed", val_split="val")
    options = {"feature_cache": tmp_path / "cache", "validate_every": 2, "workers": 1}
    result = run(recipe, data, tmp_path / "kept", val_split="val", **options)
    expected = curve(tmp_path / "computed")
    assert expected[0] - expected[-1] > 0.01, "the loss must move for this to show anything"
    assert curve(tmp_path / "kept") == pytest.approx(expected, rel=5 * HALF)  # steps add up
    assert lines()[-1] == "features: 14 computed, 0 found"
    assert len(files(tmp_path / "cache")) == 14 + 5
    alone = evaluate(tmp_path / "kept", data, "val", hardware=ALONE, progress=False)
    assert result.scores.summary == pytest.approx(alone.scores.summary, abs=0.5)


def test_evaluation_on_a_cache_gives_the_scores_of_training(kept, data, tmp_path):
    """Of its own, which it fills, and of the run, from which it computes nothing."""
    _, out, cache = kept
    expected = json.loads((out / "metrics.json").read_text())
    for folder in (cache, tmp_path / "cache"):
        result = evaluate(*(out, data, "val"), feature_cache=folder, hardware=ALONE, progress=False)
        assert result.scores.summary == expected["percent"]
    own = files(tmp_path / "cache")
    assert len(own) == 5
    assert all((cache / path.relative_to(tmp_path / "cache")).is_file() for path in own)
    with one_line(OSError, str(own[0].parent)):
        own[0].unlink()
        own[0].mkdir()
        evaluate(out, data, "val", feature_cache=tmp_path / "cache", hardware=ALONE)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (frozen(DeepLabRecipe, freeze=4), "but got freeze=4 and deform_layers=0"),
        (ClassifierRecipe(freeze=5, norm="frozen"), "but got stride 32, as in classifiers or with"),
        (frozen(DeepLabRecipe, output_stride=32, neck="residual"), "but got stride 32"),
    ],
)
def test_evaluation_keeps_features_of_frozen_backbones_only(recipe, words):
    with one_line(UserError, words):
        require_frozen(recipe.build_model(3).backbone, recipe)


def test_stages_see_images_alone_in_any_batch(data):
    """The maps of a batch with padding are those of its images without."""
    recipe = frozen(RFCNRecipe)
    images = task_of(recipe).training_set(data, "train")
    model = recipe.build_model(len(images.classes))
    batch = images.batch([0, 1, 2], [0, 1, 2]).padded(40, 64)
    assert len(set(batch.sizes)) == 3
    taken = []
    model.features = lambda maps: taken.append(maps)
    with pytest.raises(AttributeError):
        batch.losses(model)
    (maps,) = taken
    assert maps.shape[2:] == (3, 4)
    for own, image, (height, width) in zip(maps, batch.images, batch.sizes, strict=True):
        expected = model.backbone.maps(image[None, :, :height, :width])[0]
        rows, columns = expected.shape[1:]
        assert torch.allclose(own[:, :rows, :columns], expected, atol=1e-5)
        assert own[:, rows:].eq(0).all()
        assert own[:, :, columns:].eq(0).all()


def test_a_resumed_run_ends_in_the_same_bits(kept, data, tmp_path, lines):
    recipe, out, cache = kept
    run_stopped(1, recipe, data, tmp_path, feature_cache=cache, workers=1)
    run(recipe, data, tmp_path, feature_cache=cache)
    assert lines()[-1] == "features: 0 computed, 14 found"
    assert_equal_weights(tmp_path, out)


def test_damaged_missing_and_foreign_files_are_made_anew(kept, data, tmp_path, caplog):
    recipe, out, cache = kept
    shutil.copytree(cache, tmp_path / "cache")
    flipped, cut, empty, foreign, gone, *_ = files(tmp_path / "cache")
    content = bytearray(flipped.read_bytes())
    content[-9] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    foreign.write_bytes(features.pack({"other": torch.zeros(1)}, {}))
    gone.unlink()
    run(recipe, data, tmp_path / "run", val_split="val", feature_cache=tmp_path / "cache")
    assert_equal_weights(tmp_path / "run", out)
    said = {text.partition(": ")[0] for text in caplog.messages if text.endswith("recomputed")}
    assert said == {str(path) for path in (flipped, cut, empty, foreign)}
    for path in (flipped, cut, empty, foreign, gone):
        assert path.read_bytes() == (cache / path.relative_to(tmp_path / "cache")).read_bytes()


def test_other_weights_strides_sizes_and_images_have_other_features(kept, data, tmp_path, lines):
    recipe, _, cache = kept
    cache = shutil.copytree(cache, tmp_path / "cache")
    recipe = dataclasses.replace(recipe, iterations=1)
    run(dataclasses.replace(recipe, seed=1), data, tmp_path / "weights", feature_cache=cache)
    assert lines()[-2].endswith("(none are of this backbone with these weights)")
    assert lines()[-1] == "features: 14 computed, 0 found"
    fine = dataclasses.replace(recipe, output_stride=8)
    run(fine, data, tmp_path / "stride", val_split="val", feature_cache=cache)
    assert lines()[-1] == "features: 14 computed, 0 found"
    run(dataclasses.replace(recipe, short_side=33), data, tmp_path / "size", feature_cache=cache)
    assert lines()[-1] == "features: 14 computed, 0 found"
    changed = shutil.copytree(data, tmp_path / "data")
    photo = changed / open_segmentation(data, "train").image_path(0).relative_to(data)
    with Image.open(photo) as image:
        image.point(lambda value: 255 - value).save(photo)
    run(recipe, changed, tmp_path / "images", feature_cache=cache)
    assert lines()[-1] == "features: 2 computed, 12 found"


def test_a_cache_that_was_begun_is_continued(kept, data, tmp_path, lines, monkeypatch):
    recipe, out, _ = kept
    write, count = features.write_file, itertools.count(1)

    def stopping(*arguments, **options):
        write(*arguments, **options)
        if next(count) == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_file", stopping)
        with pytest.raises(TrainingStopped, match="stopped while caching features; run the same"):
            run(recipe, data, tmp_path / "run", feature_cache=tmp_path / "cache")
    begun = files(tmp_path / "cache")
    assert 3 <= len(begun) < 14
    run(recipe, data, tmp_path / "run", feature_cache=tmp_path / "cache")
    assert lines()[-1] == f"features: {14 - len(begun)} computed, {len(begun)} found"
    assert_equal_weights(tmp_path / "run", out)


def test_a_full_disk_costs_one_line_and_no_file_that_was_complete(kept, data, tmp_path, complaint):
    recipe, _, cache = kept
    cache = shutil.copytree(cache, tmp_path / "cache")
    files(cache)[0].unlink()
    before = files(cache)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        line = complaint(
            *("train", "deeplab", "--data", data, "--out", tmp_path / "run", "--workers", 0),
            *("--recipe", tmp_path / "recipe.json", "--feature-cache", cache),
            *("--accelerator", "cpu"),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(cache) in line
    assert files(cache) == before
    assert not list(cache.rglob("*.partial"))


def test_processes_share_a_cache(kept, data, tmp_path):
    """Two ranks compute each feature once, and train as one process on them."""
    recipe, out, cache = kept
    options = {"feature_cache": tmp_path / "cache", "val_split": "val"}
    job = {"do": "train", "recipe": recipe.to_dict(), "data": data, "out": tmp_path / "run"}
    wait(forked_torchrun([job | {"options": options}], tmp_path, "--nproc-per-node=2"))
    assert curve(tmp_path / "run") == pytest.approx(curve(out), rel=1e-5)
    names = [path.name for path in files(cache)]
    assert [path.name for path in files(tmp_path / "cache")] == names
    assert not list(tmp_path.rglob("*.partial"))


class Photos(Dataset):
    classes = ("background", "one")

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_jitter": (0.5, 2.0)}, "but got scale_jitter, which need"),
        ({"color_jitter": True, "crop": (16, 16)}, "but got color_jitter, crop, which need"),
        ({"freeze": 4}, "but got freeze=4 and deform_layers=0"),
        ({"deform_layers": 1}, "but got freeze=5 and deform_layers=1"),
    ],
)
def test_what_needs_other_features_is_refused(data, tmp_path, changes, words):
    with one_line(UserError, "feature_cache", words):
        run(frozen(DeepLabRecipe, **changes), data, tmp_path, feature_cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_classifiers_and_torch_data_sets_have_no_cache(tmp_path):
    with one_line(UserError, "got color_jitter, crop, resize, which need other features"):
        run(ClassifierRecipe(), tmp_path, tmp_path, feature_cache=tmp_path / "cache")
    with one_line(UserError, "expected a folder of a data set for feature_cache, but got a torch"):
        run(frozen(DeepLabRecipe), Photos(), tmp_path, feature_cache=tmp_path / "cache")


def test_features_beyond_half_precision_are_refused(tmp_path):
    model = backbone("resnet18", norm="frozen", freeze=5)
    with torch.no_grad():
        model.conv5_stage[-1].bn2.bias += 1e6
    cache = FeatureCache(tmp_path, model, CPU)
    with one_line(UserError, "at most 65504", "train without feature_cache"):
        cache.recall(torch.randn(1, 3, 32, 32))
    assert not files(tmp_path)
