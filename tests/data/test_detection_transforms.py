"""Transforms of an image with its boxes."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from deformnet.data import BoxAnnotations, detection_transforms
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Resize
from small_sets import one_line


def sample(height, width, boxes):
    """A black image with white boxes."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 255
    values = tv_tensors.BoundingBoxes(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        format="XYXY",
        canvas_size=(height, width),
    )
    labels = torch.arange(len(boxes))
    return tv_tensors.Image(image), BoxAnnotations(values, labels, labels % 2 == 1)


def brightness(image):
    """Brightness from 0 to 1, [h, w]."""
    return image[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]


def white(image):
    """Edges of the white part."""
    rows = (brightness(image) > 0.5).any(1).nonzero().flatten().tolist()
    columns = (brightness(image) > 0.5).any(0).nonzero().flatten().tolist()
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_same_size_is_only_normalized():
    transforms = detection_transforms(short_side=20, max_side=None, flip=False)
    image, annotations = sample(20, 30, [(3, 4, 10, 20), (0, 0, 30, 20)])
    out, transformed = transforms(image, annotations)
    assert isinstance(transformed, BoxAnnotations)
    assert {type(value) for value in (out, *transformed)} == {torch.Tensor}
    kinds = [torch.float32, torch.float32, torch.int64, torch.bool]
    assert [value.dtype for value in (out, *transformed)] == kinds
    assert torch.equal(transformed.boxes, annotations.boxes.as_subclass(torch.Tensor))
    assert torch.equal(transformed.labels, annotations.labels)
    assert torch.equal(transformed.ignored, annotations.ignored)
    for channel in range(3):
        expected = (image[channel] / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(out[channel], expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((375, 500), 600, 1000, (600, 800)),
        ((333, 500), 600, 1000, (600, 901)),  # 900.9, rounded
        ((480, 1000), 600, 1000, (480, 1000)),
        ((200, 500), 600, 1000, (400, 1000)),
        ((500, 333), 600, 1000, (901, 600)),
        ((9, 31), 7, None, (7, 24)),  # 24.1, rounded: the factors of the sides differ
    ],
)
def test_boxes_scale_with_the_rounded_sides(size, short, longest, expected):
    height, width = size
    transforms = detection_transforms(short_side=short, max_side=longest, flip=False)
    out, transformed = transforms(*sample(height, width, [(0, 0, width, height), (2, 3, 7, 8)]))
    assert out.shape == (3, *expected)
    down, across = expected[0] / height, expected[1] / width
    assert transformed.boxes[0].tolist() == [0, 0, expected[1], expected[0]]
    expected_box = torch.tensor([2 * across, 3 * down, 7 * across, 8 * down])
    torch.testing.assert_close(transformed.boxes[1], expected_box)


def test_whole_images_stay_inside_at_any_size():
    for height, width in torch.randint(3, 700, (200, 2), generator=torch.manual_seed(0)).tolist():
        transforms = detection_transforms(short_side=37, max_side=61, flip=True)
        out, transformed = transforms(*sample(height, width, [(0, 0, width, height)]))
        torch.testing.assert_close(
            transformed.boxes, torch.tensor([[0.0, 0, out.shape[2], out.shape[1]]])
        )
        assert (transformed.boxes >= 0).all()
        assert (transformed.boxes[0, 2:] <= torch.tensor(out.shape[:0:-1])).all()


def test_flip_includes_boxes_half_of_the_time():
    transforms = detection_transforms(short_side=40, max_side=None, flip=True)
    torch.manual_seed(0)
    flips = 0
    for _ in range(100):
        out, transformed = transforms(*sample(20, 30, [(2, 4, 10, 16)]))
        assert transformed.boxes.tolist() == [white(out)]
        flipped = transformed.boxes.tolist() == [[40, 8, 56, 32]]
        assert flipped or transformed.boxes.tolist() == [[4, 8, 20, 32]]
        flips += flipped
    assert 30 < flips < 70


def test_without_flip_nothing_is_random():
    transforms = detection_transforms(short_side=40, max_side=None, flip=False)
    boxes = {str(transforms(*sample(20, 30, [(2, 4, 10, 16)]))[1]) for _ in range(20)}
    assert len(boxes) == 1


def test_image_without_boxes():
    transforms = detection_transforms(short_side=40, max_side=50, flip=True)
    for _ in range(5):
        out, transformed = transforms(*sample(20, 30, []))
        assert out.shape == (3, 33, 50)
        assert transformed.boxes.shape == (0, 4)
        assert transformed.labels.shape == transformed.ignored.shape == (0,)


def test_input_is_unchanged():
    image, annotations = sample(20, 30, [(2, 4, 10, 16)])
    for flip in (False, True):
        detection_transforms(short_side=20, max_side=None, flip=flip)(image, annotations)
        detection_transforms(short_side=40, max_side=None, flip=flip)(image, annotations)
    assert annotations.boxes.tolist() == [[2, 4, 10, 16]]
    assert torch.equal(image, sample(20, 30, [(2, 4, 10, 16)])[0])


def test_bad_sizes():
    with one_line(ValueError, "expected short_side to be at least 1, but got 0"):
        detection_transforms(short_side=0, max_side=None, flip=False)
    with one_line(ValueError, "expected max_side to be at least 1, but got 0"):
        detection_transforms(short_side=1, max_side=0, flip=False)


def test_defaults_draw_and_compute_nothing_else():
    """Bit for bit the resizing and the flip of before there was other augmentation."""
    plain = v2.Compose(
        [
            *(Resize(30, 60), v2.ClampBoundingBoxes(), v2.RandomHorizontalFlip()),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            *(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.ToPureTensor()),
        ]
    )
    transforms = detection_transforms(short_side=30, max_side=60, flip=True)
    for seed in range(6):
        drawn = []
        for each in (plain, transforms):
            torch.manual_seed(seed)
            image, objects = each(*sample(20, 33, [(3, 4, 10, 20), (5, 0, 30, 20)]))
            drawn.append([image, *objects, torch.rand(1)])
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_scale_jitter_moves_boxes_with_their_pixels():
    transforms = detection_transforms(
        short_side=40, max_side=90, flip=True, scale_jitter=(0.5, 1.5), color_jitter=False
    )
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, objects = transforms(*sample(40, 60, [(12, 8, 30, 32)]))
        height, width = image.shape[1:]
        sizes.add(height)
        assert abs(width - 1.5 * height) <= 1
        assert objects.boxes[0].tolist() == pytest.approx(white(image), abs=1)
    assert min(sizes) >= 20
    assert max(sizes) <= 60
    assert len(sizes) > 10


def test_crops_keep_boxes():
    """Seven of ten crops miss the object, and are drawn again."""
    transforms = detection_transforms(short_side=100, max_side=None, flip=False, crop=(50, 60))
    boxes = [(4, 4, 30, 32), (80, 70, 90, 80)]  # the second one is ignored
    kept, places = 0, set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, objects = transforms(*sample(100, 120, boxes))
        assert image.shape == (3, 50, 60)
        assert len(objects.boxes) == len(objects.labels) == len(objects.ignored)
        learned = objects.boxes[~objects.ignored]
        kept += len(learned)
        if len(objects.boxes) == 1:
            assert objects.boxes[0].tolist() == white(image)
        if len(learned):
            places.add(tuple(learned[0].tolist()))
    assert kept > 35
    assert len(places) > 10


def test_crops_of_images_without_objects():
    transforms = detection_transforms(short_side=20, max_side=None, flip=False, crop=(32, 24))
    torch.manual_seed(0)
    image, objects = transforms(*sample(20, 40, []))
    assert image.shape == (3, 32, 24)
    assert objects.boxes.shape == (0, 4)
    assert len(objects.labels) == 0


def test_color_jitter_leaves_boxes_and_follows_from_the_seed():
    transforms = detection_transforms(short_side=20, max_side=None, flip=False, color_jitter=True)
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        image, objects = transforms(*sample(20, 30, [(3, 4, 10, 20)]))
        assert objects.boxes.tolist() == [[3, 4, 10, 20]]
        images.append(image)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("factors", [(0, 1), (1.5, 1), (1, float("inf")), (float("nan"), 1)])
def test_bad_factors_are_refused(factors):
    with one_line(ValueError, "expected scale_jitter to be positive and ascending, but got"):
        detection_transforms(short_side=20, max_side=None, flip=True, scale_jitter=factors)
