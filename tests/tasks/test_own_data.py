"""A torch data set of the user's own, in training and evaluation."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision import tv_tensors

import deformnet
from deformnet import UserError
from deformnet.engine import Hardware, LoopOptions, evaluate
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, RFCNRecipe, RPNRecipe
from deformnet.tasks import DataIdentity, Processes, task_of
from pictures import noise

SMALL = {"backbone": "resnet18", "batch": 2, "short_side": 48, "max_side": 80}
RECIPES = {
    "mask": DeepLabRecipe(**SMALL),
    "boxes": RFCNRecipe(**SMALL, anchor_sizes=(16, 32), proposals=10),
    "class": ClassifierRecipe(backbone="resnet18", resize=(40, 48), crop=32, test_short_side=40),
}
CLASSES = ("cat", "dog")


class Own(Dataset):
    classes = CLASSES

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def mask():
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[10:30, 20:50] = 1
    labels[0] = 255
    return labels


def boxes(**changes):
    known = {"boxes": torch.tensor([[5.0, 6, 30, 36], [20, 4, 50, 30]]), "labels": [0, 1]}
    return {**known, **changes}


TARGETS = {"mask": mask, "boxes": boxes, "class": lambda: 1}


def own(kind, *targets, count=12):
    """A data set with these targets, or the usual one."""
    return Own([(noise(40, 60), target) for target in targets or [TARGETS[kind]()] * count])


def training_set(kind, data, **recipe):
    made = RECIPES[kind]
    return task_of(type(made)(**{**vars(made), **recipe})).training_set(data)


@pytest.mark.parametrize("kind", RECIPES)
def test_own_data_train_and_evaluate(kind):
    recipe, data = RECIPES[kind], own(kind)
    images = task_of(recipe).training_set(data)
    assert (images.classes, len(images)) == (CLASSES, 12)
    torch.manual_seed(0)
    model = recipe.build_model(2)
    batch = pickle.loads(pickle.dumps(images)).batch([0, 1], [1, 2])
    losses = batch.losses(model.train())
    assert all(loss.isfinite() for loss in losses.values())
    scored = task_of(recipe).evaluation_set(data, trained_on=images.identity)
    assert scored.names == [f"{k:02}" for k in range(12)]
    assert scored.evaluate(model, Processes()).json
    picture, known = task_of(recipe).annotated(data)[0]
    assert torch.equal(picture, noise(40, 60))
    assert known.to_dict()
    assert task_of(recipe).splits(data) == []


def test_identity_is_that_of_classes_and_length():
    identity = training_set("class", own("class")).identity
    assert identity == DataIdentity.of(CLASSES, [f"{k:02}" for k in range(12)])
    assert identity == training_set("class", own("class", 0, *[1] * 11)).identity
    assert identity != training_set("class", own("class", count=13)).identity
    other = own("class")
    other.classes = ("a", "b")
    assert identity != training_set("class", other).identity
    with pytest.raises(UserError, match=r"Own: expected the classes that .* \(cat, dog\), but got"):
        task_of(RECIPES["class"]).evaluation_set(other, trained_on=identity)


def test_parts_of_a_data_set_have_its_classes():
    part = Subset(Subset(own("class"), range(8)), [1, 2, 3])
    assert training_set("class", part).classes == CLASSES


@pytest.mark.parametrize("form", ["PIL", "array", "tensor"])
def test_every_form_is_the_same_sample(form):
    image, labels = noise(40, 60), mask()
    array = image.permute(1, 2, 0).numpy()
    pair = {
        "PIL": (Image.fromarray(array), Image.fromarray(labels.numpy())),
        "array": (array, labels.numpy().astype(np.int32)),
        "tensor": (image, labels.long()),
    }[form]
    batch = training_set("mask", Own([pair]), flip=False).batch([0], [0])
    expected = training_set("mask", own("mask"), flip=False).batch([0], [0])
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.masks, expected.masks)


def test_boxes_are_clipped_and_ignored_ones_not_learned():
    target = boxes(
        boxes=np.array([[-5, 6, 30, 36], [20, 4, 90, 30], [70, 4, 90, 30]]),
        labels=torch.tensor([0, 1, 1], dtype=torch.uint8),
        ignored=[False, True, False],
    )
    images = training_set("boxes", own("boxes", target), flip=False, short_side=40)
    (learned,) = images.batch([0], [0]).targets
    assert learned.boxes.tolist() == [[0, 6, 30, 36]]
    assert learned.labels.tolist() == [0]


IMAGE = noise(40, 60)


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("class", IMAGE, r"expected \(image, target\), but got torch.uint8 \[3, 40, 60\]"),
        ("class", (IMAGE, 1, 2), r"expected \(image, target\), but got tuple of 3"),
        ("class", (IMAGE / 255, 1), r"but got torch.float32 .*; the recipe normalizes images"),
        ("class", ("none.jpg", 1), r"none\.jpg"),
        ("class", (IMAGE, 2), r"labels from 0 to 1 \(cat, dog\), but got label 2"),
        ("class", (IMAGE, "cat"), "a class index, but got str"),
        ("mask", (IMAGE, mask().float()), r"an integer mask \[40, 60\], .* got torch.float32"),
        ("mask", (IMAGE, mask()[:20]), r"as large as its image, but got torch.uint8 \[20, 60\]"),
        ("mask", (IMAGE, mask() + 1), r"labels from 0 to 1 \(cat, dog\), but got label 2"),
        ("mask", (IMAGE, {}), "got dict"),
        ("boxes", (IMAGE, []), "a dict with boxes and labels, but got list of 0"),
        ("boxes", (IMAGE, {"boxes": []}), r"a dict with boxes and labels, but got \['boxes'\]"),
        ("boxes", (IMAGE, boxes(boxes=torch.ones(2, 5))), r"boxes \[n, 4\], but got torch.float32"),
        ("boxes", (IMAGE, boxes(boxes="x")), r"boxes \[n, 4\], but got str"),
        (
            "boxes",
            (IMAGE, boxes(labels=[1])),
            "labels to be 2 integers, one per box, but got list of 1",
        ),
        ("boxes", (IMAGE, boxes(labels=[1, 2])), r"labels from 0 to 1 .* got label 2"),
        ("boxes", (IMAGE, boxes(labels=[-1, 0])), "got label -1"),
        (
            "boxes",
            (IMAGE, boxes(ignored=[0.5, 1])),
            "ignored to be 2 integers, one per box, but got",
        ),
        (
            "boxes",
            (IMAGE, boxes(boxes=[[5, 6, 30, 36], [20, 30, 10, 10]])),
            r"finite boxes x1, y1, x2, y2, but got \[20.0, 30.0, 10.0, 10.0\]",
        ),
        ("boxes", (IMAGE, boxes(boxes=[[0, 0, 1, float("nan")]], labels=[0])), "finite boxes"),
    ],
)
def test_items_are_checked_by_their_index(kind, item, message):
    good = own(kind, count=1).items[0]
    data = Own([good] * 200 + [item])
    assert len(training_set(kind, data)) == 201
    with pytest.raises((UserError, OSError), match=message) as caught:
        training_set(kind, data).batch([200], [0])
    if caught.type is UserError:
        assert str(caught.value).startswith("Own[200]: ")


class Endless(IterableDataset):
    classes = CLASSES

    def __iter__(self):
        yield from ()


def with_classes(classes):
    data = own("class")
    data.classes = classes
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Own([]), "Own: expected images, but the data set is empty"),
        (Endless(), "Endless: expected a data set with a length"),
        (with_classes(None), "with `classes`, a list of class names, but got None"),
        (with_classes(()), r"`classes`, a list of class names, but got \(\)"),
        (with_classes("cat"), "but got 'cat'"),
        (with_classes([0, 1]), r"`classes` to be unique names, but got \[0, 1\]"),
        (with_classes(["a", "a"]), "to be unique names"),
    ],
)
def test_data_sets_are_checked(data, message):
    with pytest.raises(UserError, match=message):
        training_set("class", data)


NOTHING = boxes(boxes=torch.zeros(0, 4), labels=torch.zeros(0))


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("boxes", [NOTHING], "expected objects to train on, but found none in any of the 60"),
        (
            "boxes",
            [boxes(ignored=[1, 1])],
            r"none .*: all 120 are ignored \(difficult, or crowds\)",
        ),
        (
            "boxes",
            [boxes(boxes=torch.tensor([[0.1, 0.2, 0.9, 1], [0, 0, 1, 1]]))],
            "expected boxes in pixels, .* none in any of 50 of the 60 images reaches beyond 1",
        ),
        (
            "mask",
            [torch.full((40, 60), 255)],
            r"pixels of the classes cat, dog to train on, but all pixels of all 60 masks are void",
        ),
    ],
)
def test_data_without_anything_to_learn_are_refused(kind, targets, message):
    with pytest.raises(UserError, match=f"Own: .*{message}"):
        training_set(kind, own(kind, *targets * 60))


def test_one_image_to_learn_from_is_enough():
    assert len(training_set("boxes", own("boxes", *[NOTHING] * 58, boxes(), NOTHING))) == 60
    void = torch.full((40, 60), 255)
    assert len(training_set("mask", own("mask", *[void] * 58, mask(), void))) == 60


def test_summaries():
    one = boxes(boxes=[[1, 2, 30, 40]], labels=[1])
    data = own("boxes", *[one] * 3, NOTHING, boxes(labels=[1, 1], ignored=[0, 1]))
    assert training_set("boxes", data).summary() == [
        "objects: 4 (dog 4), 1 ignored; images without objects: 1",
        "warning: no object of class cat",
    ]
    recipe = RPNRecipe(**SMALL, anchor_sizes=(16, 32), proposals=10)
    assert len(task_of(recipe).training_set(data).summary()) == 1, "it learns no classes"
    assert training_set("boxes", own("boxes", count=60)).summary() == [
        "objects in 50 of 60 images: 100 (cat 50, dog 50)"
    ]
    assert training_set("class", own("class", count=70)).summary() == [
        "50 of 70 images by class: dog 50",
        "warning: no image of class cat among these 50",
    ]
    data = own("mask", *[torch.zeros(40, 60, dtype=torch.uint8)] * 60)
    assert training_set("mask", data).summary() == [
        "pixels in 50 of 60 masks: cat 100 %",
        "warning: no pixel of class dog in these masks",
    ]


def test_reading_some_images_changes_no_random_numbers():
    class Random(Own):
        def __getitem__(self, index):
            torch.rand(3)
            return super().__getitem__(index)

    state = torch.get_rng_state()
    for kind in RECIPES:
        training_set(kind, Random(own(kind).items)).summary()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", RECIPES)
def test_own_data_from_training_to_a_prediction(kind, tmp_path):
    recipe = type(RECIPES[kind])(**{**vars(RECIPES[kind]), "batch": 2, "iterations": 2})
    hardware = Hardware(accelerator="cpu", workers=1)
    train = {"hardware": hardware, "loop": LoopOptions(progress=False)}
    result = deformnet.train(recipe, own(kind), str(tmp_path), val_data=own(kind, count=3), **train)
    assert result.scores is not None
    assert result.images == 3
    again = evaluate(tmp_path, own(kind, count=3), hardware=hardware, progress=False)
    assert again.scores.json == result.scores.json
    assert deformnet.load(str(tmp_path))(noise(40, 60)).plot()
    assert deformnet.train(recipe, own(kind), tmp_path, **train).scores is None, "no val_data"
    with pytest.raises(UserError, match="on the same data"):
        deformnet.train(recipe, own(kind, count=13), tmp_path, **train)


def test_boxes_in_other_formats():
    given = tv_tensors.BoundingBoxes(
        [[10.0, 6, 20, 30]], format="XYWH", canvas_size=(40, 60), dtype=torch.float32
    )
    data = own("boxes", boxes(boxes=given, labels=[0]))
    (learned,) = training_set("boxes", data, flip=False, short_side=40).batch([0], [0]).targets
    assert learned.boxes.tolist() == [[10, 6, 30, 36]]


def test_pil_images_keep_the_orientation_of_their_boxes():
    photo = Image.fromarray(noise(40, 60).permute(1, 2, 0).numpy())
    photo.getexif()[0x0112] = 6
    images = training_set("boxes", Own([(photo, boxes())]), flip=False, short_side=40)
    assert images.batch([0], [0]).images.shape[-2:] == (40, 60)


@pytest.mark.parametrize("kind", RECIPES)
def test_too_many_classes(kind):
    data = own(kind)
    data.classes = tuple(map(str, range(30_001)))
    with pytest.raises(UserError, match=r"Own: expected at most 30000 classes, but got 30001$"):
        training_set(kind, data)
