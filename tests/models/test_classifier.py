import math

import pytest
import torch
import torchvision
from torch.nn import functional as F

from deformnet.models import Classifier
from deformnet.models.backbones import backbone
from deformnet.recipes import imagenet


def classifier(num_classes=3, **options):
    torch.manual_seed(0)
    return Classifier(
        backbone("resnet18", output_stride=32, reduce_channels=None, **options), num_classes
    )


def test_it_is_the_classifier_of_torchvision():
    """The same network, written by others: stride 32, global mean, one layer."""
    theirs = torchvision.models.resnet18().eval()
    ours = classifier(1000).eval()
    state = {
        name if name.startswith("fc.") else f"backbone.{name}": tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 65, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_it_starts_without_a_preference():
    model = classifier(5).eval()
    logits = model(torch.randn(4, 3, 32, 32)).detach()
    assert logits.shape == (4, 5)
    loss = model.losses(logits, torch.arange(4))["classification"]
    assert float(loss) == pytest.approx(math.log(5), abs=0.8)


def test_the_loss_is_the_mean_over_images():
    model = classifier()
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    losses = model.losses(logits, torch.tensor([0, 2]))
    assert list(losses) == ["classification"]
    first = math.log(math.exp(2) + 1 + math.exp(1)) - 2
    assert losses["classification"].item() == pytest.approx((first + math.log(3)) / 2)
    losses["classification"].backward()
    expected = (F.softmax(logits.detach(), 1) - F.one_hot(torch.tensor([0, 2]), 3)) / 2
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("options", [{}, {"deform_layers": 3, "modulated": True}])
def test_gradients_reach_everything(options):
    model = classifier(**options)
    images = torch.randn(4, 3, 64, 64)
    model.losses(model(images), torch.tensor([0, 1, 2, 0]))["classification"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_labels_out_of_range(label):
    with pytest.raises(ValueError, match=f"expected labels to be 0 to 2, but got {label}"):
        classifier().losses(torch.zeros(2, 3), torch.tensor([0, label]))


def test_wrong_arguments():
    model = classifier()
    message = r"expected labels to be \[2\] like the logits, but got \[3\]"
    with pytest.raises(ValueError, match=message):
        model.losses(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected labels to be int64, but got torch\.float32"):
        model.losses(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="expected num_classes to be at least 1, but got 0"):
        classifier(0)


@pytest.mark.parametrize(
    ("name", "millions"), [("aligned-inception-resnet", 64.3), ("resnet101", 44.5)]
)
def test_parameters_of_table_7(name, millions):
    """Of ResNet-101 the paper counts 46.0 M; torchvision's has 44.5."""
    with torch.device("meta"):
        model = imagenet(backbone=name).build_model(1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_the_papers_settings_on_imagenet():
    recipe = imagenet(backbone="resnet50")
    assert recipe.backbone == "resnet50"
    assert (recipe.batch, recipe.iterations, recipe.lr, recipe.weight_decay) == (
        *(256, 600_000, 0.1, 1e-4),
    )
    assert (recipe.resize, recipe.crop, recipe.test_short_side) == ((256, 480), 224, 256)
    assert (recipe.deform_layers, recipe.color_jitter, recipe.flip) == (0, True, True)
    rates = [recipe.lr * recipe.lr_factor(i) for i in (0, 199_999, 200_000, 399_999, 400_000)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
