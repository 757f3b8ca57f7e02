import copy
import re
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from deformnet import DeformConv2d
from deformnet.analysis import sampling_locations
from deformnet.models.backbones import resnet

TORCHVISION = {
    18: torchvision.models.resnet18,
    34: torchvision.models.resnet34,
    50: torchvision.models.resnet50,
    101: torchvision.models.resnet101,
}


def deformable(model):
    return [name for name, module in model.named_modules() if isinstance(module, DeformConv2d)]


def trained_torchvision(depth):
    """A torchvision ResNet whose batch norm does something, in float64."""
    torch.manual_seed(0)
    model = TORCHVISION[depth](weights=None).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def saved(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("depth", "norm"),
    [(18, "frozen"), (18, "trained"), (34, "frozen"), (50, "frozen"), (101, "trained")],
)
def test_torchvision_weights_load_and_give_its_features(tmp_path, depth, norm):
    theirs = trained_torchvision(depth)
    path = saved(tmp_path, theirs.state_dict())
    ours = resnet(depth, weights=path, norm=norm, reduce_channels=None).double().eval()
    # Loading into a float32 model rounds the weights; compare exactly.
    own = ours.state_dict()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in own})
    images = torch.randn(1, 3, 65, 50, dtype=torch.float64)
    stages = IntermediateLayerGetter(theirs, {"layer3": "conv4", "layer4": "conv5"})(images)
    with torch.no_grad():
        conv4, conv5 = ours.stages(images)
    torch.testing.assert_close(conv4, stages["conv4"])
    assert stages["conv5"].shape[-2:] == (3, 2)
    assert conv5.shape[-2:] == conv4.shape[-2:] == (5, 4)
    assert ours.conv4_channels == conv4.shape[1]
    assert ours.conv5_channels == ours.out_channels == conv5.shape[1]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_conv5_is_torchvisions_with_every_3x3_dilated(depth, dilation):
    theirs = trained_torchvision(depth)
    ours = resnet(depth, dilation=dilation, reduce_channels=None).double().eval()
    own = ours.state_dict()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in own})
    x = torch.randn(1, ours.conv4_channels, 7, 6, dtype=torch.float64)

    def convolve(conv, x):
        d = dilation if conv.kernel_size == (3, 3) else 0
        return F.conv2d(x, conv.weight, padding=d, dilation=max(d, 1))

    expected = x
    for block in theirs.layer4:
        identity = expected
        if block.downsample is not None:
            identity = block.downsample[1](convolve(block.downsample[0], expected))
        y = block.bn1(convolve(block.conv1, expected)).relu()
        y = block.bn2(convolve(block.conv2, y))
        if depth >= 50:
            y = block.bn3(convolve(block.conv3, y.relu()))
        expected = (y + identity).relu()
    torch.testing.assert_close(ours.layer4(x), expected)


def test_units_are_centred_on_multiples_of_the_stride():
    # With equal positive weights the gradient is the receptive field, symmetric about its center.
    model = resnet(18, norm="frozen", reduce_channels=None).double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e-2)
    # The same window as maximum pooling, which on a constant map would pick one corner of it.
    model.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    images = torch.ones(1, 3, 513, 561, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images)[0, 0, 16, 17], images)
    field = gradient[0].sum(0) / gradient.sum()
    rows = (field.sum(1) * torch.arange(513)).sum().item()
    columns = (field.sum(0) * torch.arange(561)).sum().item()
    assert (rows, columns) == pytest.approx((16 * model.stride, 17 * model.stride), abs=0.01)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_only_conv5_is_dilated(depth):
    model = resnet(depth, dilation=4, deform_layers=3)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            dilated = name.startswith("layer4.")
            assert module.dilation == ((4, 4) if dilated else (1, 1)), name
            if dilated:
                assert module.stride == (1, 1), name
                assert module.padding == (4, 4), name


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (97, 16)], ids=str)
@torch.no_grad()
def test_output_sizes(depth, size):
    model = resnet(depth, deform_layers=2, reduce_channels=24).eval()
    height, width = size
    rows, columns = -(-height // 16), -(-width // 16)
    images = torch.randn(2, 3, height, width)
    features = model(images)
    assert features.shape == (2, 24, rows, columns)
    assert features.min() >= 0
    assert model.out_channels == 24
    for stage, channels in zip(
        model.stages(images), (model.conv4_channels, model.conv5_channels), strict=True
    ):
        assert stage.shape == (2, channels, rows, columns)


@pytest.mark.parametrize(
    ("depth", "count", "names"),
    [
        (50, 0, []),
        (50, 1, ["layer4.2.conv2"]),
        (50, 3, [f"layer4.{i}.conv2" for i in range(3)]),
        (50, 6, [f"layer3.{i}.conv2" for i in (3, 4, 5)] + [f"layer4.{i}.conv2" for i in range(3)]),
        (101, 6, [f"layer3.{i}.conv2" for i in (20, 21, 22)]
         + [f"layer4.{i}.conv2" for i in range(3)]),
        (18, 2, ["layer4.1.conv1", "layer4.1.conv2"]),
        (18, 6, [f"layer{s}.{i}.conv{j}" for s, i, j in
                 ((3, 1, 1), (3, 1, 2), (4, 0, 1), (4, 0, 2), (4, 1, 1), (4, 1, 2))]),
        (34, 6, [f"layer4.{i}.conv{j}" for i in range(3) for j in (1, 2)]),
    ],
)  # fmt: skip
def test_deform_layers_count_from_the_end(depth, count, names):
    model = resnet(depth, deform_layers=count)
    assert deformable(model) == names
    for name in names:
        layer = model.get_submodule(name)
        assert layer.conv_offset.dilation == layer.dilation


def test_all_3x3_convolutions_can_be_deformable():
    # 16 bottlenecks; the first of conv3 and conv4 have stride 2.
    model = resnet(50, deform_layers=16).eval()
    assert len(deformable(model)) == 16
    assert model(torch.randn(1, 3, 33, 40)).shape == (1, 1024, 3, 3)


@pytest.mark.parametrize("groups", [1, 4])
def test_parameters_that_the_offsets_add(groups):
    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    added = count(resnet(101, deform_layers=3, offset_groups=groups)) - count(resnet(101))
    assert added == {1: 248_886, 4: 995_544}[groups]


def test_deformable_starts_as_the_plain_network():
    torch.manual_seed(0)
    plain = resnet(50, norm="frozen", reduce_channels=32).eval()
    other = resnet(50, norm="frozen", reduce_channels=32, deform_layers=6, modulated=True).eval()
    result = other.load_state_dict(plain.state_dict(), strict=False)
    assert all(".conv_offset." in key for key in result.missing_keys)
    assert not result.unexpected_keys
    images = torch.randn(1, 3, 48, 33)
    with torch.no_grad():
        expected = plain.stages(images)[1]
        difference = other.stages(images)[1] - expected
    assert difference.abs().max() <= 1e-5 * expected.abs().max()


def test_keys_are_torchvisions():
    theirs = set(torchvision.models.resnet50(weights=None).state_dict())
    ours = set(resnet(50, deform_layers=1).state_dict())
    assert theirs - ours == {"fc.weight", "fc.bias"}
    assert ours - theirs == {
        "reduce.weight",
        "reduce.bias",
        "layer4.2.conv2.conv_offset.weight",
        "layer4.2.conv2.conv_offset.bias",
    }
    frozen = set(resnet(50, deform_layers=1, norm="frozen").state_dict())
    assert {key.rpartition(".")[2] for key in ours - frozen} == {"num_batches_tracked"}
    assert frozen <= ours


def test_own_state_dict_loads_as_weights(tmp_path):
    torch.manual_seed(0)
    model = resnet(18, deform_layers=2)
    nn.init.normal_(model.get_submodule("layer4.1.conv1.conv_offset").weight)
    path = saved(tmp_path, model.state_dict())
    again = resnet(18, deform_layers=2, weights=str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"unexpected key layer4.1.conv1.conv_offset.weight and 3"):
        resnet(18, weights=path)


def test_weights_by_name(monkeypatch):
    state = TORCHVISION[18](weights=None).state_dict()
    # The published files predate the counts of batches.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    asked = []

    def get_state_dict(self, check_hash=False):
        asked.append((self.name, check_hash))
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    model = resnet(18, weights="IMAGENET1K_V1", deform_layers=1)
    assert asked == [("IMAGENET1K_V1", True)]
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_frozen_norm_changes_nothing_in_training():
    torch.manual_seed(0)
    model = resnet(18, norm="frozen", deform_layers=2, reduce_channels=8).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    fixed = set(before) - changed
    assert all(key in fixed for key in before if re.search(r"\bbn\d|downsample\.1", key))
    assert all(key in fixed for key in before if key.startswith(("conv1.", "layer1.")))
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "layer4.1.conv2.conv_offset.weight" in changed
    assert "layer2.0.conv1.weight" in changed


def test_frozen_stages_can_still_deform():
    model = resnet(18, norm="frozen", deform_layers=16)
    assert not model.get_submodule("layer1.0.conv1").weight.requires_grad
    assert model.get_submodule("layer1.0.conv1.conv_offset").weight.requires_grad


def test_frozen_norm_is_batch_norm_in_evaluation():
    torch.manual_seed(0)
    trained = resnet(18, reduce_channels=None).eval()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    frozen = resnet(18, norm="frozen", reduce_channels=None)
    frozen.load_state_dict(trained.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen.train()(images), trained(images))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert frozen(images).dtype == torch.bfloat16


def test_trained_norm_trains_everything():
    model = resnet(18, deform_layers=1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.bn1.running_mean.clone()
    model.train()(torch.randn(2, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before)


def test_new_layers_start_small():
    torch.manual_seed(0)
    reduce = resnet(18).reduce
    assert reduce.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not reduce.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, r"expected depth to be one of \(18, 34, 50, 101\), but got 20"),
        ({"norm": "group"}, r"expected norm to be one of .*'frozen'.*, but got 'group'"),
        ({"dilation": 0}, "expected dilation to be at least 1, but got 0"),
        ({"reduce_channels": 0}, "expected reduce_channels to be at least 1 or None, but got 0"),
        ({"deform_layers": 17}, r"expected deform_layers to be 0 to 16, .* ResNet-18, but got 17"),
        ({"deform_layers": -1}, r"expected deform_layers to be 0 to 16, .* got -1"),
        ({"deform_layers": 1, "offset_groups": 3}, "not a multiple of 3 groups"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet(**{"depth": 18, **arguments})


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 3, 32, 32)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match=r"expected images to be \[N, 3, H, W\], but got"):
        resnet(18)(torch.randn(shape))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_weights():
    with pytest.raises(FileNotFoundError, match="IMAGENET1K_V1") as error:
        resnet(18, weights="IMAGENET1K_V9")
    assert "IMAGENET1K_V9" in one_line(error)


def test_failed_download(monkeypatch):
    def get_state_dict(self, check_hash=False):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(
        OSError, match=r"cannot download IMAGENET1K_V1 from https.*no route"
    ) as error:
        resnet(18, weights="IMAGENET1K_V1")
    one_line(error)


def garbage(path):
    path.write_bytes(b"not a checkpoint at all")


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    torch.save(TORCHVISION[18](weights=None).state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])


def a_whole_module(path):
    torch.save(nn.Linear(2, 2), path)


@pytest.mark.parametrize("write", [garbage, empty, truncated, a_whole_module])
def test_unreadable_weights(tmp_path, write):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=r"damaged, or not a PyTorch checkpoint") as error:
        resnet(18, weights=path)
    assert str(path) in one_line(error)


def test_weights_of_another_model(tmp_path):
    good = TORCHVISION[18](weights=None).state_dict()
    wrong = {
        "expected a state dict, but got a dict with keys 'model', 'epoch'": {
            "model": good,
            "epoch": 3,
        },
        "expected a state dict, but got list": [1, 2],
        r"expected weights of ResNet-18: missing key .* and \d+ more": nn.Linear(2, 2).state_dict(),
        "but got ResNet-50: unexpected key layer1.0.conv3.weight": TORCHVISION[50](
            weights=None
        ).state_dict(),
        r"expected layer2.0.conv1.weight to be \[128, 64, 3, 3\], but got \[1\]": {
            **good,
            "layer2.0.conv1.weight": torch.zeros(1),
        },
    }
    for message, state in wrong.items():
        path = saved(tmp_path, state)
        with pytest.raises(ValueError, match=message) as error:
            resnet(18, weights=path)
        assert str(path) in one_line(error)


def test_run_with_other_strides_is_refused(tmp_path):
    model = resnet(50, stride_in_1x1=True, reduce_channels=None)
    checkpoint = {
        "deformnet": {"recipe": {"backbone": "resnet50", "stride_in_1x1": True}},
        "model": {f"backbone.{k}": v for k, v in model.state_dict().items()},
    }
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints/last.ckpt")
    resnet(50, stride_in_1x1=True, weights=tmp_path)
    with pytest.raises(ValueError, match=r"trained with stride_in_1x1=False, but got True"):
        resnet(50, weights=tmp_path)


def test_the_order_of_the_parameters_stays():
    """Checkpoints hold the momentum of each by its place."""
    names = [name for name, _ in resnet(18).named_parameters()]
    assert names[0] == "conv1.weight"
    assert names[-2:] == ["reduce.weight", "reduce.bias"]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("deform_layers", [0, 3])
def test_filters_of_the_chain_read_one_another(depth, deform_layers):
    model = resnet(depth, deform_layers=deform_layers, reduce_channels=16)
    chain = model.filter_chain()
    assert len(chain) == {18: 4, 50: 3}[depth]
    image = torch.rand(1, 3, 64, 80)
    points, _ = sampling_locations(model, image, chain[:3], (1, 2))
    stretch = 2 * model.stride * 3  # dilation 2, three layers
    y, x = model.stride * 1, model.stride * 2
    assert points.shape == (1, 9**3, 2)
    assert points[0].amin(0).tolist() == [y - stretch, x - stretch]
    assert points[0].amax(0).tolist() == [y + stretch, x + stretch]
