"""Transforms of an image with its label map: sizes, values and randomness."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from deformnet import UserError
from deformnet.data import segmentation_evaluation_transforms, segmentation_training_transforms
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Resize
from pictures import noise


def pair(height, width):
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 5, (height, width), generator=g, dtype=torch.uint8)
    return tv_tensors.Image(noise(height, width)), tv_tensors.Mask(mask)


def training(short_side, crop=None, flip=False):
    return segmentation_training_transforms(
        short_side=short_side, max_side=None, crop=crop, flip=flip
    )


def normalized(image):
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image.float() / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((375, 500), 360, 600, (360, 480)),
        ((500, 375), 360, 600, (480, 360)),
        ((200, 500), 360, 600, (240, 600)),
        ((200, 500), 360, None, (360, 900)),
        ((1024, 2048), 1024, 2048, (1024, 2048)),
        ((333, 500), 360, 600, (360, 541)),  # 540.54, rounded
        ((1, 500), 360, 600, (1, 600)),
    ],
)
def test_size_after_resizing(size, short, longest, expected):
    image, mask = segmentation_evaluation_transforms(short_side=short, max_side=longest)(
        *pair(*size)
    )
    assert image.shape == (3, *expected)
    assert mask.shape == expected


def test_same_size_is_only_normalized():
    image, mask = pair(24, 36)
    out, labels = segmentation_evaluation_transforms(short_side=24, max_side=None)(image, mask)
    assert (out.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert type(out) is type(labels) is torch.Tensor
    torch.testing.assert_close(out, normalized(image))
    assert torch.equal(labels, mask.long())


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_image_is_resized_as_in_pillow(kind):
    image, mask = pair(61, 83)
    out = Resize(29, None, InterpolationMode(kind))(image, mask)[0]
    size = (round(83 * 29 / 61), 29)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.asarray(pillow.resize(size, Image.Resampling[kind.upper()]))
    error = np.abs(out.permute(1, 2, 0).numpy().astype(int) - expected)
    assert error.max() <= 1


@pytest.mark.parametrize("short", [9, 20, 47, 80, 160])
def test_mask_is_sampled_at_pixel_centers(short):
    image, mask = pair(40, 56)
    height, width = Resize(short, None).size(40, 56)
    out = Resize(short, None)(image, mask)[1]
    rows = ((np.arange(height) + 0.5) * 40 / height).astype(int)
    columns = ((np.arange(width) + 0.5) * 56 / width).astype(int)
    np.testing.assert_array_equal(out.numpy(), mask.numpy()[np.ix_(rows, columns)])


def test_labels_stay_with_their_pixels():
    """Each label has its channel, so the largest channel is the label after every step."""
    mask = torch.zeros(50, 70, dtype=torch.uint8)
    mask[:, 30:] = 1
    mask[20:35, 10:50] = 2
    image = 255 * torch.nn.functional.one_hot(mask.long(), 3).permute(2, 0, 1).to(torch.uint8)
    transforms = training(100, crop=(90, 110), flip=True)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    for seed in range(5):
        torch.manual_seed(seed)
        out, labels = transforms(tv_tensors.Image(image), tv_tensors.Mask(mask))
        colors = out * std[:, None, None] + mean[:, None, None]
        wrong = (colors.argmax(0) != labels).float().mean()
        assert wrong < 0.002  # rounded corners


def test_crop_of_a_smaller_image_is_padded():
    image, mask = pair(20, 30)
    transforms = training(20, crop=(32, 40))
    places = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out, labels = transforms(image, mask)
        assert out.shape == (3, 32, 40)
        inside = labels != 255
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        assert inside.sum() == 20 * 30
        places.add((int(rows[0]), int(columns[0])))
        assert torch.equal(labels[inside], mask.long().flatten())
        torch.testing.assert_close(out[:, inside], normalized(image).flatten(1))
        assert out[:, ~inside].abs().max() < 0.01  # the mean color in 8 bits
    assert len(places) > 10


def test_crop_is_padded_along_one_side():
    out, labels = training(20, crop=(32, 24))(*pair(20, 30))
    assert out.shape == (3, 32, 24)
    assert (labels != 255).sum() == 20 * 24


def test_flip_includes_the_mask_half_of_the_time():
    image, mask = pair(20, 30)
    transforms = training(20, flip=True)
    torch.manual_seed(0)
    flips = 0
    for _ in range(100):
        out, labels = transforms(image, mask)
        flipped = not torch.equal(labels, mask.long())
        flips += flipped
        expected = image.flip(-1) if flipped else image
        torch.testing.assert_close(out, normalized(expected))
        assert torch.equal(labels, (mask.flip(-1) if flipped else mask).long())
    assert 30 < flips < 70


def test_randomness_is_from_the_global_generator():
    sample = pair(40, 60)
    transforms = training(50, crop=(32, 32), flip=True)
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append([transforms(*sample) for _ in range(4)])
    for (a, b), (c, d) in zip(*results, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert not torch.equal(results[0][0][0], results[0][1][0])


def test_defaults_draw_and_compute_nothing_else():
    """Bit for bit the resizing, the crop and the flip of before there was other augmentation."""
    fill = {tv_tensors.Image: [124, 116, 104], tv_tensors.Mask: 255}
    kinds = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    plain = v2.Compose(
        [
            *(Resize(30, None), v2.RandomCrop((24, 56), pad_if_needed=True, fill=fill)),
            *(v2.RandomHorizontalFlip(), v2.ToDtype(kinds, scale=True)),
            *(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.ToPureTensor()),
        ]
    )
    for seed in range(6):
        drawn = []
        for each in (plain, training(30, crop=(24, 56), flip=True)):
            torch.manual_seed(seed)
            drawn.append([*each(*pair(40, 60)), torch.rand(1)])
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_scale_and_color_jitter():
    """Labels stay with their pixels, and the seed decides both."""
    transforms = segmentation_training_transforms(
        short_side=40, max_side=60, crop=None, flip=True, scale_jitter=(0.5, 2), color_jitter=True
    )
    image, mask = pair(40, 60)
    results = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        out, labels = transforms(image, mask)
        assert out.shape[1:] == labels.shape
        assert 20 <= labels.shape[0] <= 80
        results.append((out, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert len({labels.shape for _, labels in results}) > 2
    colors = segmentation_training_transforms(
        short_side=40, max_side=60, crop=None, flip=False, color_jitter=True
    )
    out, labels = colors(image, mask)
    assert torch.equal(labels, mask.long())
    assert not torch.equal(out, normalized(image))


def test_strips_do_not_fill_the_memory():
    """A picture of 157 bytes, 1 x 20000 pixels, would become one of 1.3 gigapixels."""
    with pytest.raises(UserError, match=r"at most 100 million .* one of 20000x1, .* 5120000x256"):
        Resize(256, None)(*pair(1, 20000))


def test_bad_sizes():
    with pytest.raises(ValueError, match="expected max_side to be at least 1, but got -1"):
        segmentation_evaluation_transforms(short_side=8, max_side=-1)
    with pytest.raises(ValueError, match="expected short_side to be at least 1, but got 0"):
        segmentation_evaluation_transforms(short_side=0, max_side=None)
    with pytest.raises(ValueError, match="expected short_side to be at least 1, but got 0"):
        training(0)
    with pytest.raises(ValueError, match="expected crop to be at least 1, but got 0"):
        training(8, crop=(4, 0))
