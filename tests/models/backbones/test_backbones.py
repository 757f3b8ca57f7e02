"""What all backbones have in common."""

import copy

import pytest
import torch
import torchvision
from backbone_testing import bare, randomize_norms
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from deformnet import DeformConv2d
from deformnet.analysis import sampling_locations
from deformnet.models.backbones import backbone

ALIGNED = "aligned-inception-resnet"
SMALL = ["resnet18", "resnet50", ALIGNED]


def build(name, **options):
    torch.manual_seed(0)
    return backbone(name, **options)


@pytest.mark.parametrize("name", [*SMALL, "resnet34", "resnet101"])
@pytest.mark.parametrize("dilation", [2, 4])
def test_only_conv5_is_dilated(name, dilation):
    model = bare(name, dilation=dilation, deform_layers=3)
    assert model.stride == 16
    conv5 = set(model.conv5_stage.modules())
    for part, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            expected = dilation if module in conv5 else 1
            assert module.dilation == module.padding == (expected, expected), part
            assert module not in conv5 or module.stride == (1, 1), part


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (97, 16)], ids=str)
def test_output_sizes(name, output_stride, size):
    options = {"output_stride": output_stride, "deform_layers": 2, "reduce_channels": 24}
    model = bare(name, **options).eval()
    images = torch.empty(2, 3, *size, device="meta")
    conv4, conv5 = model.stages(images)
    stride = min(16, output_stride)
    assert conv4.shape == (2, model.conv4_channels, *(-(-side // stride) for side in size))
    rows, columns = (-(-side // output_stride) for side in size)
    assert conv5.shape == (2, model.conv5_channels, rows, columns)
    assert model(images).shape == (2, model.out_channels, rows, columns) == (2, 24, rows, columns)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"dilation": 4, "deform_layers": 6}),
        ("resnet18", {"neck": "residual", "deform_layers": 2}),
        ("resnet50", {}),
        ("resnet50", {"stride_in_1x1": True}),
        (ALIGNED, {}),
    ],
)
def test_stride_8_has_the_features_of_stride_16_at_more_positions(name, options):
    fine, usual = (
        build(name, output_stride=stride, reduce_channels=None, **options).double().eval()
        for stride in (8, 16)
    )
    randomize_norms(fine)
    usual.load_state_dict(fine.state_dict())
    images = torch.randn(1, 3, 67, 90, dtype=torch.float64)
    for found, expected in zip(fine.stages(images), usual.stages(images), strict=True):
        assert found.shape[2:] == (9, 12)
        torch.testing.assert_close(found[..., ::2, ::2], expected)


@pytest.mark.parametrize(
    ("name", "count", "layers"),
    [
        ("resnet50", 0, []),
        ("resnet50", 1, ["layer4.2.conv2"]),
        ("resnet50", 3, [f"layer4.{i}.conv2" for i in range(3)]),
        ("resnet50", 6, [f"layer{s}.conv2" for s in ("3.3", "3.4", "3.5", "4.0", "4.1", "4.2")]),
        ("resnet101", 4, [f"layer{s}.conv2" for s in ("3.22", "4.0", "4.1", "4.2")]),
        ("resnet18", 2, ["layer4.1.conv1", "layer4.1.conv2"]),
        ("resnet18", 6, [f"layer{s}.conv{j}" for s in ("3.1", "4.0", "4.1") for j in (1, 2)]),
        ("resnet34", 6, [f"layer4.{i}.conv{j}" for i in range(3) for j in (1, 2)]),
        (ALIGNED, 0, []),
        (ALIGNED, 1, ["stage5.2.branch2.2.conv"]),
        (ALIGNED, 2, ["stage5.2.branch2.1.conv", "stage5.2.branch2.2.conv"]),
        (ALIGNED, 3, [f"stage5.2.branch{p}.conv" for p in ("1.1", "2.1", "2.2")]),
        (ALIGNED, 6, [f"stage5.{b}.branch{p}.conv" for b in (1, 2) for p in ("1.1", "2.1", "2.2")]),
        (ALIGNED, 10, ["stage4.22.branch2.2.conv"]
         + [f"stage5.{b}.branch{p}.conv" for b in range(3) for p in ("1.1", "2.1", "2.2")]),
    ],
)  # fmt: skip
def test_deform_layers_count_from_the_end(name, count, layers):
    model = bare(name, deform_layers=count)
    assert [n for n, module in model.named_modules() if isinstance(module, DeformConv2d)] == layers
    for layer in map(model.get_submodule, layers):
        assert layer.conv_offset.dilation == layer.dilation


@pytest.mark.parametrize(("name", "count"), [("resnet50", 16), (ALIGNED, 99)])
def test_all_3x3_convolutions_can_be_deformable(name, count):
    model = bare(name, deform_layers=count).eval()
    assert sum(isinstance(module, DeformConv2d) for module in model.modules()) == count
    assert model(torch.empty(1, 3, 33, 40, device="meta")).shape == (1, 1024, 3, 3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet50", ALIGNED])
def test_deformable_starts_as_the_baseline(name):
    baseline = build(name, norm="frozen", reduce_channels=32).eval()
    options = {"deform_layers": 6, "modulated": True, "offset_groups": 4}
    other = build(name, norm="frozen", reduce_channels=32, **options).eval()
    result = other.load_state_dict(baseline.state_dict(), strict=False)
    assert all(".conv_offset." in key for key in result.missing_keys)
    assert len(result.missing_keys) == 12
    assert not result.unexpected_keys
    images = torch.randn(1, 3, 48, 33)
    expected = baseline.stages(images)[1]
    assert expected.std() > 0
    difference = other.stages(images)[1] - expected
    assert difference.abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "frozen"), [("resnet18", ("conv1.", "layer1.")), (ALIGNED, ("stem.", "stage2."))]
)
def test_frozen_norm_changes_nothing_in_training(name, frozen):
    model = build(name, norm="frozen", deform_layers=2, reduce_channels=8).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {key for key, p in model.named_parameters() if p.requires_grad}
    norms = [
        n for n, m in model.named_modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)
    ]
    assert norms
    assert not any(key.startswith((*frozen, *(f"{norm}." for norm in norms))) for key in changed)
    stages = {key.split(".")[0] for key in changed}
    assert len(stages) == 4  # conv3, conv4, conv5 and the reduction
    assert any("conv_offset.weight" in key for key in changed)


@pytest.mark.parametrize("name", SMALL)
def test_frozen_stages(name):
    for stages in range(6):
        model = bare(name, norm="frozen", freeze=stages, deform_layers=6)
        fixed = set(sum(model.trunk_stages[:stages], ()))
        assert len(model.trunk_stages) == 4
        conv5 = {id(parameter) for parameter in model.conv5_stage.parameters()}
        for key, parameter in model.named_parameters():
            frozen = key.split(".")[0] in fixed or (stages == 5 and id(parameter) in conv5)
            assert parameter.requires_grad == (not frozen or "conv_offset" in key), key


@pytest.mark.parametrize("name", SMALL)
def test_trained_norm_trains_everything(name):
    model = bare(name, deform_layers=1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", ALIGNED])
def test_own_state_dict_loads_as_weights(name, tmp_path):
    path = tmp_path / "weights.pth"
    model = build(name, deform_layers=2, reduce_channels=8)
    offsets = [module.conv_offset for module in model.modules() if isinstance(module, DeformConv2d)]
    nn.init.normal_(offsets[0].weight)
    torch.save(model.state_dict(), path)
    again = backbone(name, deform_layers=2, reduce_channels=8, weights=str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"unexpected key .*\.conv_offset\.weight and 3"):
        backbone(name, reduce_channels=8, weights=path)


def test_aligned_inception_resnet_refuses_weights_of_another_model(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    message = r"weights\.pth: .* Aligned-Inception-ResNet, but got ResNet-18: missing key stem"
    with pytest.raises(ValueError, match=message):
        backbone(ALIGNED, weights=path)
    with pytest.raises(FileNotFoundError, match=r"IMAGENET1K_V1: no such file; .*there are none"):
        backbone(ALIGNED, weights="IMAGENET1K_V1")
    torch.save({key: torch.zeros(1) for key in bare(ALIGNED).state_dict()}, path)
    with pytest.raises(ValueError, match=r"expected stem.conv.weight to be .*, but got \[1\]"):
        backbone(ALIGNED, weights=path)


@pytest.mark.parametrize("name", SMALL)
def test_reduction_comes_last_and_starts_small(name):
    # Checkpoints hold the momentum of each parameter by its position.
    names = [key for key, _ in bare(name).named_parameters()]
    assert names[0] == ("stem.conv.weight" if name == ALIGNED else "conv1.weight")
    assert names[-2:] == ["reduce.weight", "reduce.bias"]
    reduce = build("resnet18").reduce
    assert reduce.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not reduce.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, r"expected norm to be one of .*'frozen'.*, but got 'group'"),
        ({"freeze": 1}, "expected norm to be frozen for freeze=1, but got trained"),
        ({"freeze": 6, "norm": "frozen"}, "expected freeze to be 0 to 5, but got 6"),
        ({"output_stride": 4}, r"expected output_stride to be one of \(8, 16, 32\), but got 4"),
        ({"dilation": 0}, "expected dilation to be at least 1, but got 0"),
        ({"reduce_channels": 0}, "expected reduce_channels to be at least 1 or None, but got 0"),
        ({"deform_layers": 100}, r"expected deform_layers to be 0 to (16|99), .*, but got 100"),
        ({"deform_layers": -1}, r"expected deform_layers to be 0 to .* got -1"),
        ({"deform_layers": 1, "offset_groups": 3}, "not a multiple of 3 groups"),
        ({"stride_in_1x1": True}, "expected stride_in_1x1 to be False for "),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet18", ALIGNED])
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        bare(name, **options)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"expected name to be one of \('resnet18', .*'resnet20'"):
        backbone("resnet20")


@pytest.mark.parametrize("name", ["resnet18", ALIGNED])
@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 3, 32, 32)])
def test_wrong_images(name, shape):
    with pytest.raises(ValueError, match=r"expected images to be \[N, 3, H, W\], but got"):
        bare(name)(torch.empty(shape, device="meta"))


@pytest.mark.parametrize(("name", "length"), [("resnet18", 4), ("resnet50", 3), (ALIGNED, 6)])
@pytest.mark.parametrize("deform_layers", [0, 3])
def test_filter_chain_samples_a_regular_grid(name, length, deform_layers):
    model = build(name, deform_layers=deform_layers, reduce_channels=16)
    chain = model.filter_chain()
    assert len(chain) == length
    assert all(model.get_submodule(layer).kernel_size == (3, 3) for layer in chain)
    for stride in (None, 16):  # traced, or given
        points, inside = sampling_locations(
            model, torch.rand(1, 3, 64, 80), chain[:3], (1, 2), stride=stride
        )
        steps = torch.arange(-6, 7, 2) * 16  # dilation 2, three layers
        assert points.shape == (1, 9**3, 2)
        assert points[0, :, 0].unique().tolist() == (16 + steps).tolist()
        assert points[0, :, 1].unique().tolist() == (32 + steps).tolist()
        assert 0 < inside.sum() < len(inside[0])


@pytest.mark.parametrize(
    "name", ["resnet18", "timm/test_resnet", "timm/regnetx_002", "timm/test_convnext"]
)
@pytest.mark.parametrize("neck", ["none", "residual"])
def test_recomputed_activations(name, neck):
    """Equal outputs, gradients and running statistics, with less stored for the backward pass."""
    options = {"deform_layers": 1, "reduce_channels": 8, "neck": neck, "neck_channels": 8}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    steps = []
    for recompute in (False, True):
        model = build(name, **options)
        if recompute:
            model.checkpoint_activations()
        numbers = []
        with saved_tensors_hooks(lambda it: numbers.append(it.numel()) or it, lambda it: it):  # noqa: B023
            output = model(images)
        output.square().sum().backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        steps.append((sum(numbers), {"output": output, **gradients}, model.state_dict()))
    (stored, expected, state), (less, found, again) = steps
    assert less < 0.5 * stored
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_activations_are_recomputed_in_every_backward_pass():
    model = build("timm/test_resnet", deform_layers=1)
    model.checkpoint_activations()
    output = model(torch.ones(2, 3, 64, 64)).square().sum()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    first = torch.autograd.grad(output, weights, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, weights), first)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


class DenselyConnected(nn.Sequential):
    """Blocks that take the list of all features before them, as in timm's RDNet."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        features = [input]
        for block in self:
            features.append(block(features))
        return features[-1]


class SumOfAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.relu(torch.stack(features).sum(dim=0)).square()


def test_recomputed_blocks_take_lists_as_they_were():
    gradients = []
    for recompute in (False, True):
        model = build("timm/test_resnet", deform_layers=0)
        layer = model.get_submodule("trunk.layer1")
        assert isinstance(layer, nn.Sequential)
        layer.append(DenselyConnected(SumOfAll(), SumOfAll()))
        if recompute:
            model.checkpoint_activations()
        images = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64).requires_grad_()
        model(images).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients)


def test_compilers_choose_what_to_recompute():
    """PyTorch's compiler cannot trace the contexts of `checkpoint`."""
    model = build("timm/test_resnet", deform_layers=0)
    block, images = model.get_submodule("trunk.layer1.0"), torch.ones(2, 32, 8, 8)
    expected = block(images)
    model.checkpoint_activations()
    found = torch.compile(block, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
