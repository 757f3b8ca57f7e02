import copy
import io

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations

from deformnet import DeformConv2d, deform_, parameter_groups


class Block(nn.Module):
    """A little of everything: plain, depthwise, shared, and of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.alias = self.twice
        self.aside = [self.twice]  # a reference that is no submodule
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        x = self.depthwise(self.norm(self.stem(x)).relu())
        return self.up(self.aside[0](self.alias(self.twice(x))))


class Padded(nn.Conv2d):
    """Sets arguments only, and so stays convertible."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)
        self.padding = (1, 1)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def names_of(model, kind=DeformConv2d):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def snapshot(model):
    """Everything that must not change when a conversion fails."""
    return (
        repr(model),
        {name: id(module) for name, module in model.named_modules()},
        {name: id(parameter) for name, parameter in model.named_parameters()},
    )


def assert_unchanged_by(before, after):
    scale = before.abs().max()
    assert scale > 0
    tolerance = 1e-10 if before.dtype == torch.float64 else 1e-5
    assert (after - before).abs().max() <= tolerance * scale


# Their library, name and options; a pattern and the number of convolutions that it matches.
MODELS = [
    (torchvision.models.get_model, "resnet50", {}, "layer4.*.conv2", 3),
    # Depthwise convolutions, of 5x5 and of 7x7.
    (torchvision.models.get_model, "mobilenet_v3_small", {}, "features.1?.block.1.0", 2),
    (torchvision.models.get_model, "convnext_tiny", {}, "features.7.*.block.0", 3),
    # A zero-initialized residual branch would pass no gradient in the first step.
    (timm.create_model, "resnet26", {"zero_init_last": False}, "layer[34].*.conv2", 4),
    (timm.create_model, "convnext_atto", {}, "stages.3.*.conv_dw", 2),
]


@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize(("build", "name", "options", "pattern", "count"), MODELS)
def test_known_networks_start_unchanged_and_learn_offsets(
    build, name, options, pattern, count, modulated
):
    torch.manual_seed(0)
    model = build(name, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
    converted = deform_(model, pattern, modulated=modulated)
    assert len(converted) == count
    assert names_of(model) == converted
    with torch.no_grad():
        assert_unchanged_by(before, model(images))

    optimizer = torch.optim.SGD(parameter_groups(model, 0.1))
    model(images).square().mean().backward()
    optimizer.step()
    for layer in converted:
        assert model.get_submodule(layer).conv_offset.weight.any(), layer


def test_everything_in_float64():
    torch.manual_seed(0)
    model = Block().double()
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    before = model(x)
    assert deform_(model, "stem", "depth*", "twice") == ["stem", "depthwise", "twice"]
    assert_unchanged_by(before, model(x))
    assert model.depthwise.conv_offset.groups == 1
    assert model.stem.conv_offset.weight.dtype == torch.float64


def test_state_dict_only_gains_the_offsets():
    model = torchvision.models.resnet18(weights=None)
    before = list(model.state_dict())
    deform_(model, "layer4.1.*")
    after = list(model.state_dict())
    assert [key for key in after if ".conv_offset." not in key] == before
    assert set(after) - set(before) == {
        f"layer4.1.{conv}.conv_offset.{name}"
        for conv in ("conv1", "conv2")
        for name in ("weight", "bias")
    }


def test_the_parameters_are_the_same_objects():
    model = Block()
    model.stem.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight, bias = model.stem.weight, model.stem.bias
    deform_(model, "stem")
    assert model.stem.weight is weight
    assert model.stem.bias is bias
    assert not model.stem.weight.requires_grad
    assert model.stem.conv_offset.weight.requires_grad
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    old = bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.stem.bias, old)


def test_shared_layers_stay_shared():
    model = Block()
    assert deform_(model, "alias") == ["alias"]
    assert model.twice is model.alias is model.aside[0]
    assert isinstance(model.twice, DeformConv2d)
    assert deform_(Block(), "twice", "alias") == ["twice"]


def test_training_mode_dtype_hooks_and_attributes_are_kept():
    model = Block().bfloat16()
    model.stem.eval()
    model.stem.note = "mine"
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append("hook"))
    deform_(model, "stem", "twice")
    assert not model.stem.conv_offset.training
    assert model.twice.conv_offset.training
    assert model.stem.conv_offset.weight.dtype == torch.bfloat16
    assert model.stem.note == "mine"
    model(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16))
    assert calls == ["hook"]


def test_old_style_weight_norm_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    x = torch.randn(1, 3, 6, 6)
    before = model(x)
    deform_(model, "0")
    assert_unchanged_by(before, model(x))
    model[0].weight_g.data.mul_(2)
    bias = model[0].bias[:, None, None]
    assert_unchanged_by(2 * (before - bias), model(x) - bias)


def test_a_subclass_that_only_sets_arguments():
    torch.manual_seed(0)
    model = nn.Sequential(Padded(4))
    x = torch.randn(1, 4, 6, 6)
    before = model(x)
    assert deform_(model, "0") == ["0"]
    assert_unchanged_by(before, model(x))


def test_a_second_run_does_not_nest():
    model = Block()
    deform_(model, "stem", "twice", "depthwise")
    before = snapshot(model)
    assert deform_(model, "stem", "twice", "depthwise") == []
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"'stem.conv_offset\*' matches no module"):
        deform_(model, "stem.conv_offset*")
    with pytest.raises(ValueError, match=r"'stem' is already deformable with offset_groups=1"):
        deform_(model, "stem", modulated=True)


def test_copies_and_files():
    torch.manual_seed(0)
    model = Block()
    deform_(model, "stem", "twice")
    nn.init.normal_(model.stem.conv_offset.weight)
    x = torch.randn(1, 3, 16, 16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert other.twice is other.alias
    fresh = Block()
    deform_(fresh, "stem", "twice")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_lists_near_misses():
    model = torchvision.models.resnet18(weights=None)
    with pytest.raises(ValueError, match=r"'layer4.0.conv3' .* near misses: .*'layer4.0.conv[12]'"):
        deform_(model, "layer4.0.conv3")
    with pytest.raises(ValueError, match=r"'layer4' matches no convolution, only 'layer4' \(Seq"):
        deform_(model, "layer4")
    with pytest.raises(ValueError, match=r"'zzz' matches no module, convolutions are 'conv1', "):
        deform_(model, "zzz")
    with pytest.raises(ValueError, match=r"the model contains no nn.Conv2d"):
        deform_(nn.Sequential(nn.Linear(2, 2)), "0")


@pytest.mark.parametrize(
    "patterns", [("stem", "stam"), ("nothing*", "stem"), ("stem", "up"), ("*",)], ids=str
)
def test_nothing_changes_when_one_pattern_fails(patterns):
    model = Block()
    before = snapshot(model)
    with pytest.raises(ValueError, match="deform_ left the model unchanged") as error:
        deform_(model, *patterns)
    assert "\n" not in str(error.value)
    assert snapshot(model) == before


def test_many_problems_fit_on_a_line():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(50)))
    with pytest.raises(ValueError, match=r"'0' has 3 input channels.*; and 45 more$") as error:
        deform_(model, "*", offset_groups=2)
    assert len(str(error.value)) < 500


def quantized():
    layer = nn.Conv2d(4, 4, 3)
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    return torch.ao.nn.qat.Conv2d.from_float(layer)


def patched():
    layer = nn.Conv2d(4, 4, 3)
    layer.forward = lambda x: x
    return layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.ConvTranspose2d(4, 4, 3), "is a ConvTranspose2d, not an nn.Conv2d"),
        (lambda: nn.Conv1d(4, 4, 3), "is a Conv1d, not an nn.Conv2d"),
        (lambda: nn.Conv3d(4, 4, 3), "is a Conv3d, not an nn.Conv2d"),
        (lambda: nn.LazyConv2d(4, 3), "is an uninitialized LazyConv2d"),
        (lambda: StdConv2d(4, 4, 3), r"is a StdConv2d, which overrides nn.Conv2d \(forward\)"),
        (lambda: Conv2dSame(4, 4, 3), r"is a Conv2dSame, which overrides nn.Conv2d \(forward\)"),
        (lambda: Doubled(4, 4, 3), r"is a Doubled, which overrides nn.Conv2d \(forward\)"),
        (patched, r"is a Conv2d, which overrides nn.Conv2d \(forward\)"),
        (quantized, "is a Conv2d, which overrides nn.Conv2d"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "has parametrized weights"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "has parametrized weights"),
        (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "has weights of torch.complex64"),
        (lambda: nn.Conv2d(3, 4, 3), "has 3 input channels, not a multiple of 2 groups"),
    ],
)
def test_refuses_by_name_and_reason(build, reason):
    model = nn.ModuleDict({"good": nn.Conv2d(4, 4, 3), "odd": build()})
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'odd' {reason}"):
        deform_(model, "good", "odd", offset_groups=2)
    assert snapshot(model) == before


def test_a_lazy_layer_after_its_first_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(torch.randn(1, 3, 8, 8))
    assert deform_(model, "0") == ["0"]


def test_parametrization_after_conversion():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    deform_(model, "0")
    x = torch.randn(1, 3, 6, 6)
    before = model(x)
    parametrizations.weight_norm(model[0])
    assert_unchanged_by(before, model(x))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="expected patterns to be at least one"):
        deform_(Block())
    with pytest.raises(TypeError, match="expected patterns to be strings, but got 3"):
        deform_(Block(), 3)
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, but got str"):
        deform_("layer4", "conv1")
    with pytest.raises(ValueError, match=r"expected model .* but got a single Conv2d"):
        deform_(nn.Conv2d(3, 3, 3), "*")
    with pytest.raises(ValueError, match="expected offset_groups to be at least 1, but got 0"):
        deform_(Block(), "stem", offset_groups=0)
