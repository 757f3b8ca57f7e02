import pytest
import torch
from torch import nn

from deformnet import DeformConv2d, UserError, parameter_groups
from deformnet.models.backbones import backbone
from deformnet.recipes import RECIPES, DeepLabRecipe, RPNRecipe, recipe_from_dict

LITE0 = "timm/tf_efficientnet_lite0"
FROZEN = {"norm": "frozen", "freeze": 5}


def build(name=LITE0, **options):
    torch.manual_seed(0)
    return backbone(name, neck="residual", neck_channels=8, **options)


@pytest.mark.parametrize("name", [LITE0, "resnet18"])
@torch.no_grad()
def test_the_neck_is_conv5(name):
    plain = backbone(name, reduce_channels=None)
    model = build(name, neck_layers=6, dilation=4, deform_layers=2)
    assert model.filters() == [f"neck.{layer}.conv" for layer in range(1, 7)]
    assert model.filter_chain() == tuple(reversed(model.filters()))
    deformable = [key for key, layer in model.named_modules() if isinstance(layer, DeformConv2d)]
    assert deformable == model.filters()[-2:]
    for key in model.filters():
        assert model.get_submodule(key).dilation == (4, 4)
    model.base.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 70, 96)
    conv4, conv5 = model.eval().stages(images)
    torch.testing.assert_close(conv4, plain.eval()(images))
    assert conv4.shape[1] == model.conv4_channels == plain.out_channels
    assert conv5.shape == (1, model.out_channels, 5, 6)
    assert torch.equal(model(images), conv5)
    without = build(name, neck_layers=6, dilation=4)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "_offset" not in k})
    torch.testing.assert_close(without.eval()(images), conv5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [LITE0, "resnet18", "timm/convnext_atto"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_a_unit_sees_the_pixels_around_its_position(name, output_stride):
    model = build(name, dilation=1, neck_layers=1, output_stride=output_stride).eval()
    images = torch.randn(1, 3, 192, 192, requires_grad=True)
    unit = 96 // output_stride
    model(images)[0, :, unit, unit].sum().backward()
    rows = images.grad.abs().sum(dim=(0, 1, 3))
    center = (rows * torch.arange(192)).sum() / rows.sum()
    # At stride 16, the 2x2 convolution before conv5 reads units i and i + 1.
    expected = 104 if (name, output_stride) == ("timm/convnext_atto", 16) else 96
    assert center == pytest.approx(expected, abs=6)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.network)
def test_only_the_neck_and_the_heads_of_a_frozen_backbone_train(recipe):
    torch.manual_seed(0)
    layers = 0 if recipe is RPNRecipe else 2
    options = {"neck": "residual", "deform_layers": layers, "neck_channels": 8, **FROZEN}
    model = recipe(backbone=LITE0, **options).build_model(3).train()
    assert not any(module.training for module in model.backbone.base.modules())
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):  # the first step moves offsets alone in a classifier with zero weights
        optimizer.zero_grad()
        sum(model.random_losses(torch.randn(2, 3, 64, 96))().values()).backward()
        optimizer.step()
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert not any(key.startswith("backbone.base.") for key in changed)
    neck = {key for key in before if key.startswith("backbone.neck.")}
    assert any("conv_offset" in key for key in neck) == bool(layers)
    assert changed & neck == (set() if recipe is RPNRecipe else neck)


def test_a_trained_backbone_trains():
    model = build("resnet18").train()
    assert all(module.training for module in model.modules())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    frozen = build("resnet18", **FROZEN)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.base.modules())
    assert {k for k, p in frozen.named_parameters() if p.requires_grad} == {
        key for key, _ in frozen.named_parameters() if key.startswith("neck.")
    }
    partly = build("resnet18", norm="frozen", freeze=4).train()
    assert partly.base.training
    assert not partly.base.layer3[0].conv1.weight.requires_grad
    assert partly.base.layer4[0].conv1.weight.requires_grad


def test_weights_with_and_without_a_neck(tmp_path):
    plain, model = backbone(LITE0, reduce_channels=None), build(deform_layers=1)
    nn.init.normal_(model.neck[3].conv.conv_offset.weight)
    for saved, path in ((plain, tmp_path / "plain.pth"), (model, tmp_path / "neck.pth")):
        for norm in saved.modules():
            if hasattr(norm, "running_mean"):
                nn.init.normal_(norm.running_mean)
        torch.save(saved.state_dict(), path)

    again = build(deform_layers=1, weights=tmp_path / "neck.pth").state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    found = build(weights=tmp_path / "plain.pth").base.state_dict()
    assert all(torch.equal(found[key], value) for key, value in plain.state_dict().items())
    found = backbone(LITE0, weights=tmp_path / "neck.pth").state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.base.state_dict().items())
    with pytest.raises(UserError, match=r"missing key neck\.4\.conv\.weight and"):
        build(neck_layers=4, weights=tmp_path / "neck.pth")


def test_weights_of_another_backbone(tmp_path):
    torch.save(backbone("resnet18").state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"expected weights of ResNet-34, but got ResNet-18: "):
        build("resnet34", weights=tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deform_layers": 4}, "to be 0 to 3, the number of 3x3 convolutions in the neck of timm/"),
        ({"neck_layers": 0}, "expected neck_layers to be positive, but got 0"),
        ({"neck_channels": 0}, "expected neck_channels to be positive, but got 0"),
        ({"neck_layers": 2000}, "expected neck_layers to be at most 1024, but got 2000"),
    ],
)
def test_necks_that_cannot(options, message):
    with pytest.raises(UserError, match=message):
        DeepLabRecipe(backbone=LITE0, neck="residual", **options).build_model(2)


def test_recipe():
    recipe = DeepLabRecipe(neck="residual", neck_layers=6)
    assert recipe_from_dict(recipe.to_dict(), source="x") == recipe
    with pytest.raises(
        ValueError, match=r"expected neck to be one of \('none', 'residual'\), but got 'x'"
    ):
        backbone("resnet18", neck="x")
    with pytest.raises(TypeError, match="expected neck to be one of 'none', 'residual'"):
        DeepLabRecipe(neck="x")
