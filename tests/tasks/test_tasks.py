"""What all tasks have in common: sets, scores and predictors of untrained networks."""

import dataclasses
import threading

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from deformnet import UserError
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.recipes import (
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    RPNRecipe,
    TestTimeAugmentation,
)
from deformnet.tasks import DataIdentity, Processes, TaskOptions, task_of
from deformnet.tasks.loading import stack

SMALL = {"backbone": "resnet18", "batch": 2, "short_side": 48, "max_side": 80}
DETECTOR = SMALL | {"anchor_sizes": (16, 32), "proposals": 10}
CLASSIFIER = ClassifierRecipe(backbone="resnet18", resize=(40, 48), crop=32, test_short_side=40)
RECIPES = [
    DeepLabRecipe(**SMALL, crop=(40, 48)),
    RFCNRecipe(**DETECTOR),
    RPNRecipe(**DETECTOR),
    CLASSIFIER,
]


FLIP = TestTimeAugmentation(flip=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Shapes in the layout of each task."""
    root = tmp_path_factory.mktemp("shapes")
    small = {"train": 8, "val": 5, "height": 56, "width": 64}
    write_shapes(root / "voc", Shapes(**small))
    write_shapes(root / "classes", Shapes(**small, layout="image-folder"))
    return root


def folder_of(folders, recipe):
    return folders / ("classes" if recipe is CLASSIFIER else "voc")


def network(recipe, classes):
    torch.manual_seed(0)
    return recipe.build_model(len(classes))


def predictor_for(recipe, images):
    data = DataIdentity.of(images.classes, [])
    return task_of(recipe).predictor(network(recipe, images.classes), data, "cpu")


def tensors(value):
    """All tensors and numbers in a batch, in order."""
    if isinstance(value, list | tuple):
        return [part for item in value for part in tensors(item)]
    return [torch.as_tensor(value)] if value is not None else []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.network)
def test_batches_follow_from_the_seeds(folders, recipe):
    images = task_of(recipe).training_set(folder_of(folders, recipe), "train")
    assert len(images) >= 8
    state = torch.get_rng_state()
    batch = images.batch([1, 0], [1, 2**63])
    assert torch.equal(state, torch.get_rng_state()), "the generator of the caller is untouched"
    torch.rand(3)
    again, swapped = images.batch([1, 0], [1, 2**63]), images.batch([1, 0], [2**63, 1])
    same = [torch.equal(a, b) for a, b in zip(tensors(batch), tensors(again), strict=True)]
    assert all(same)
    other = [torch.equal(a, b) for a, b in zip(tensors(batch), tensors(swapped), strict=False)]
    assert not all(other)
    losses = batch.losses(network(recipe, images.classes).train())
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet18", InterpolationMode.BILINEAR),
        ("timm/test_resnet", InterpolationMode.BILINEAR),
        ("timm/test_efficientnet", InterpolationMode.BICUBIC),
    ],
)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.network)
def test_images_are_resized_as_for_published_weights(
    folders, recipe, backbone, expected, monkeypatch
):
    resize, found = F.resize, []

    def record(image, size, *, interpolation, antialias=True):
        found.append(interpolation)
        return resize(image, size, interpolation=interpolation, antialias=antialias)

    folder, recipe = folder_of(folders, recipe), dataclasses.replace(recipe, backbone=backbone)
    task = task_of(recipe)
    training, evaluation = task.training_set(folder, "train"), task.evaluation_set(folder, "val")
    predictor = predictor_for(recipe, evaluation)
    monkeypatch.setattr(F, "resize", record)
    for see in (
        lambda: training.batch([0, 1], [0, 1]),
        lambda: evaluation.evaluate(predictor.model, Processes()),
        lambda: predictor.predict(torch.zeros(3, 100, 90, dtype=torch.uint8)),
    ):
        found.clear()
        see()
        assert set(found) - {InterpolationMode.NEAREST_EXACT} == {expected}


class Threads:
    """Processes that are threads of this one."""

    def __init__(self, rank, count, values, barrier):
        self.rank, self.count, self.device = rank, count, torch.device("cpu")
        self.workers, self.progress, self.timeout = 0, False, 60
        self._values, self._barrier = values, barrier

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait()
        return list(self._values)

    def stopping(self):
        return False


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.network)
def test_scores_are_those_of_any_number_of_processes(folders, recipe):
    task = task_of(recipe)
    images = task.evaluation_set(folder_of(folders, recipe), "val")
    model = network(recipe, images.classes)
    expected = images.evaluate(model, Processes())
    assert expected.json
    assert str(expected.table)
    for count in (2, 4):
        values, barrier, scores = [None] * count, threading.Barrier(count), [None] * count

        def run(rank, count=count, values=values, barrier=barrier, scores=scores):
            scores[rank] = images.evaluate(model, Threads(rank, count, values, barrier))

        threads = [threading.Thread(target=run, args=[rank]) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for other in scores:
            assert str(other.json) == str(expected.json)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.network)
def test_annotated_images_draw_and_locate(folders, recipe):
    task = task_of(recipe)
    images = task.annotated(folder_of(folders, recipe), "val")
    image, known = images[0]
    assert image.dtype == torch.uint8
    predicted = predictor_for(recipe, images).annotate(image)
    if not task.localizes:
        assert known.label in images.classes
        assert [predicted.draw(image), known.draw(image)] == [None, None]
        ranking = predicted.ranking(3)
        assert len(ranking) == 3
        assert ranking[0][1] >= ranking[1][1]
        return
    small = torch.nn.functional.interpolate(image[None], scale_factor=2)[0]
    for annotation in (known, predicted):
        assert annotation.draw(image).width >= image.shape[2]
        assert annotation.draw(small).width >= small.shape[2]
    contents = known.contents(images.countable)
    assert contents.things
    assert all(thing.area > 0 for thing in contents.things)
    assert contents.background.shape == image.shape[1:]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (RECIPES[0], {"augmentation": FLIP}, "augmentation does not apply to deeplab"),
        (CLASSIFIER, {"augmentation": FLIP}, "augmentation does not apply to classifier"),
        (CLASSIFIER, {"score_at": "network"}, "score_at does not apply to classifier"),
        (RECIPES[1], {"score_at": "network"}, "score_at does not apply to rfcn"),
        (RECIPES[2], {"proposals": ("x",)}, "no stored proposals for rpn, which makes its own"),
        (RECIPES[1], {"proposals": ("x",)}, "x: no such file"),
    ],
)
def test_options_of_other_tasks_are_refused(recipe, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "proposals" in options:
        options = {"proposals": tuple(tmp_path / name for name in options["proposals"])}
    with pytest.raises((UserError, FileNotFoundError), match=message):
        task_of(recipe, TaskOptions(**options))


def test_networks_of_stored_proposals_need_them(folders):
    recipe = FasterRCNNRecipe(**DETECTOR)
    task = task_of(recipe)
    classes = task.evaluation_set(folders / "voc", "val").classes
    stored = DataIdentity.of(classes, [], proposals="digest")
    model = network(recipe, classes)
    for refused in (
        lambda: task.evaluation_set(folders / "voc", "val", stored),
        lambda: task.proposal_set(folders / "voc", "val", stored),
        lambda: task.predictor(model, stored),
    ):
        with pytest.raises(UserError, match="stored"):
            refused()


def test_only_detectors_make_proposals(folders):
    with pytest.raises(UserError, match=r"expected a detector, .* but got deeplab"):
        task_of(RECIPES[0]).proposal_set(folders / "voc", "val", DataIdentity.of((), []))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.network)
def test_other_classes_are_refused(folders, recipe):
    trained_on = DataIdentity.of(("cat", "dog"), [])
    for opened in (task_of(recipe).evaluation_set, task_of(recipe).annotated):
        with pytest.raises(UserError, match=r"trained on \(cat, dog\), but got "):
            opened(folder_of(folders, recipe), "val", trained_on)


def test_unknown_recipes_are_refused():
    class Other(Recipe):
        network = "other"
        image_size = (1, 1)

        def build_model(self, num_classes):
            raise NotImplementedError

        def scaled(self, factor):
            return self

    with pytest.raises(TypeError, match="a known task, but got Other"):
        task_of(Other())


def test_label_maps_without_a_class_are_not_trained_on(tmp_path):
    """All void, as label ids of one's own are in the layout of Cityscapes."""
    for folder, name, pixels in (
        ("leftImg8bit", "town_0_leftImg8bit.png", Image.new("RGB", (64, 56))),
        ("gtFine", "town_0_gtFine_labelIds.png", Image.new("L", (64, 56), 3)),
    ):
        (tmp_path / folder / "train/town").mkdir(parents=True)
        pixels.save(tmp_path / folder / "train/town" / name)
    task = task_of(RECIPES[0])
    with pytest.raises(UserError, match=r"split train, but all pixels .* are void .*classes\.txt"):
        task.training_set(tmp_path, "train")


def test_batches_of_bounded_size():
    """Two narrow strips are small, but their padded batch is not."""
    strips = [torch.zeros(1).expand(3, *size) for size in ((40_000, 1), (1, 40_000))]
    with pytest.raises(UserError, match="expected a batch of at most 1000 million pixels, but got"):
        stack(strips)
    assert stack([strip[:, :4, :4] for strip in strips]).shape == (2, 3, 4, 4)
