import pytest
import torch
import torch.nn.functional as F

from deformnet import parameter_groups
from deformnet.models import DeepLab
from deformnet.models.backbones import backbone
from deformnet.recipes import DeepLabRecipe


def small(**options):
    torch.manual_seed(0)
    return DeepLab(backbone("resnet18", reduce_channels=16, **options), num_classes=5)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (45, 90)], ids=str)
@torch.no_grad()
def test_scores_have_the_size_of_the_image(size):
    model = small(deform_layers=1).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 48), (56, 37)], ids=str)
def test_upsampling_is_the_authors(size):
    model = small().eval()
    images = torch.randn(1, 3, *size)
    units = model.classifier(model.backbone(images))
    assert units.shape[-2:] == (4, 3)
    # Transposed convolution with the bilinear kernel of 32, stride 16, cropped from (8, 8) on.
    ramp = 1 - (torch.arange(32) - 15.5).abs() / 16
    kernel = torch.outer(ramp, ramp).expand(5, 1, 32, 32)
    expected = F.conv_transpose2d(units, kernel, stride=16, groups=5)[..., 8:, 8:]
    inner = (..., slice(8, 56), slice(8, min(40, size[1])))  # beyond, the authors' fades to zero
    torch.testing.assert_close(model(images)[inner], expected[inner])


def test_loss_is_the_mean_over_valid_pixels():
    model = small()
    logits = torch.randn(2, 5, 6, 7, requires_grad=True)
    target = torch.randint(0, 5, (2, 6, 7))
    target[0, :3] = 255
    target[1, 0, 0] = 255
    losses = model.losses(logits, target)
    assert list(losses) == ["segmentation"]
    loss = losses["segmentation"]
    expected = F.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == ()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.transpose(0, 1)[:, target == 255].any()


def test_loss_of_images_is_the_loss_of_their_logits():
    model, images = small().eval(), torch.randn(2, 3, 40, 56)
    target = torch.randint(0, 5, (2, 40, 56))
    target[1, :9] = 255
    loss = model.losses_of_images(images, target)["segmentation"]
    torch.testing.assert_close(loss, model.losses(model(images), target)["segmentation"])


def test_loss_at_a_stride_compares_the_centers_of_cells():
    model, images = small().eval(), torch.randn(2, 3, 48, 64)
    model.loss_stride = 16
    target = torch.randint(0, 5, (2, 48, 64))
    scores = model.classifier(model.backbone(images))
    expected = F.cross_entropy(scores, target[:, 8::16, 8::16])
    torch.testing.assert_close(model.losses_of_images(images, target)["segmentation"], expected)


@pytest.mark.parametrize("stride", [0, 3, 32])
def test_loss_stride_divides_the_stride_of_the_features(stride):
    with pytest.raises(ValueError, match=f"loss_stride to be a divisor of 16, .* got {stride}"):
        DeepLab(backbone("resnet18"), 5, stride)


@pytest.mark.parametrize("output_stride", [8, 32])
@pytest.mark.parametrize("neck", ["none", "residual"])
@pytest.mark.parametrize("name", ["resnet18", "timm/test_convnext"])
def test_a_step_at_another_output_stride(name, neck, output_stride):
    torch.manual_seed(0)
    recipe = DeepLabRecipe(
        backbone=name, neck=neck, deform_layers=2, output_stride=output_stride, loss_stride=4
    )
    model, images = recipe.build_model(5), torch.randn(2, 3, 90, 70)
    assert model.scores(images).shape[2:] == (-(-90 // output_stride), -(-70 // output_stride))
    assert model(images).shape == (2, 5, 90, 70)
    target = torch.randint(0, 5, (2, 90, 70))
    before = model.losses_of_images(images, target)["segmentation"]
    before.backward()
    torch.optim.SGD(parameter_groups(model, 0.01), 0.01).step()
    after = model.losses_of_images(images, target)["segmentation"]
    assert after < before


def test_no_valid_pixel_gives_zero_with_zero_gradients():
    model = small(deform_layers=1)
    images = torch.randn(2, 3, 20, 24)
    loss = model.losses(model(images), torch.full((2, 20, 24), 255))["segmentation"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("label", [5, 254, 256, -1])
def test_labels_out_of_range(label):
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, 2, 1] = label
    message = f"expected labels of target to be 0 to 4 or 255, but got {label}"
    with pytest.raises(ValueError, match=message):
        small().losses(torch.zeros(1, 5, 4, 4), target)


def test_wrong_targets():
    model, logits = small(), torch.zeros(1, 5, 4, 4)
    message = r"expected target to be \[1, 4, 4\] .*, but got \[1, 4, 3\]"
    with pytest.raises(ValueError, match=message):
        model.losses(logits, torch.zeros(1, 4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected target to be int64, but got torch\.uint8"):
        model.losses(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("count", [0, 256, -3])
def test_wrong_number_of_classes(count):
    with pytest.raises(ValueError, match=f"expected num_classes to be 1 to 255, but got {count}"):
        DeepLab(backbone("resnet18"), num_classes=count)


@pytest.mark.parametrize(("norm", "modulated"), [("frozen", True), ("trained", False)])
def test_learns_two_halves(norm, modulated):
    model = small(deform_layers=3, norm=norm, modulated=modulated)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    images[..., 16:] += 2
    target = torch.zeros(2, 32, 32, dtype=torch.int64)
    target[..., 16:] = 1
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-3))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.losses(model(images), target)["segmentation"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        if ".conv_offset." in name:
            assert parameter.any(), name


def test_classifier_starts_small():
    model = DeepLab(backbone("resnet18"), num_classes=21)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.classifier.bias.any()


def test_parameters_of_the_papers_network():
    # ResNet-101 without its classifier, conv5's reduction to 1024, and 21 classes.
    model = DeepLab(backbone("resnet101"), num_classes=21)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 42_500_160 + (2048 * 1024 + 1024) + (1024 * 21 + 21)


@pytest.mark.parametrize("modulated", [False, True])
def test_export_with_dynamic_image_size(modulated):
    torch.manual_seed(0)
    features = backbone("resnet18", deform_layers=2, modulated=modulated, reduce_channels=8)
    model = DeepLab(features, 5).eval()
    sizes = {2: torch.export.Dim("h", min=33, max=1024), 3: torch.export.Dim("w", min=33, max=1024)}
    program = torch.export.export(model, (torch.randn(1, 3, 67, 83),), dynamic_shapes=(sizes,))
    for size in ((64, 64), (65, 50), (47, 96)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(program.module()(images), model(images))
