import json
import socket
import time
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from backbone_testing import bare, randomize_norms, torchvision_resnet
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from deformnet.models._tensors import pack
from deformnet.models.backbones import backbone


def saved(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("depth", "norm"),
    [(18, "frozen"), (18, "trained"), (34, "frozen"), (50, "frozen"), (101, "trained")],
)
def test_torchvision_weights_load_and_give_its_features(tmp_path, depth, norm):
    theirs = torchvision_resnet(depth)
    path = saved(tmp_path, theirs.state_dict())
    ours = backbone(f"resnet{depth}", weights=path, norm=norm, reduce_channels=None).double().eval()
    # Loading into a float32 model rounds the weights; compare exactly.
    assert ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys == []
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
    theirs = torchvision_resnet(depth)
    ours = backbone(f"resnet{depth}", dilation=dilation, reduce_channels=None).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
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


@pytest.mark.parametrize("groups", [1, 4])
def test_parameters_that_the_offsets_add(groups):
    def count(**options):
        return sum(p.numel() for p in bare("resnet101", **options).parameters())

    added = count(deform_layers=3, offset_groups=groups) - count()
    assert added == {1: 248_886, 4: 995_544}[groups]


def test_keys_are_torchvisions():
    theirs = set(torchvision.models.resnet50(weights=None).state_dict())
    ours = set(backbone("resnet50", deform_layers=1).state_dict())
    assert theirs - ours == {"fc.weight", "fc.bias"}
    assert ours - theirs == {
        "reduce.weight",
        "reduce.bias",
        "layer4.2.conv2.conv_offset.weight",
        "layer4.2.conv2.conv_offset.bias",
    }
    frozen = set(backbone("resnet50", deform_layers=1, norm="frozen").state_dict())
    assert {key.rpartition(".")[2] for key in ours - frozen} == {"num_batches_tracked"}
    assert frozen <= ours


def test_weights_by_name(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    # The published files predate the counts of batches.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    asked = []

    def get_state_dict(self, check_hash=False):
        asked.append((self.name, check_hash))
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    model = backbone("resnet18", weights="IMAGENET1K_V1", deform_layers=1)
    assert asked == [("IMAGENET1K_V1", True)]
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_published_weights_are_verified(monkeypatch, tmp_path):
    """Each time, also if they were downloaded earlier; and they have to be finite."""
    published = torchvision.models.ResNet18_Weights
    state = torchvision.models.resnet18().state_dict()
    file = tmp_path / "checkpoints" / published.IMAGENET1K_V1.url.rpartition("/")[2]
    file.parent.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(published, "get_state_dict", lambda self, check_hash=False: state)
    file.write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=f"^{file}: damaged, expected the sha256 f37072fd.* in"
    ) as e:
        backbone("resnet18", weights="IMAGENET1K_V1")
    one_line(e)
    file.unlink()
    backbone("resnet18", weights="IMAGENET1K_V1")
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^IMAGENET1K_V1: expected conv1\.weight to be finite"):
        backbone("resnet18", weights="IMAGENET1K_V1")


def test_waits_for_a_download(monkeypatch, caplog):
    limits = []

    def get_state_dict(self, check_hash=False):
        limits.append(socket.getdefaulttimeout())
        time.sleep(0.2)
        raise TimeoutError("timed out")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    monkeypatch.setattr("deformnet._hub._PATIENCE", 0.02)
    for seconds in (None, "7"):
        if seconds is not None:
            monkeypatch.setenv("DEFORMNET_DOWNLOAD_TIMEOUT", seconds)
        with pytest.raises(OSError, match=r"cannot download IMAGENET1K_V1 .*\(timed out\)"):
            backbone("resnet18", weights="IMAGENET1K_V1")
    assert limits == [60, 7]
    assert socket.getdefaulttimeout() is None
    assert caplog.messages[0].startswith("the download of IMAGENET1K_V1 from https://")
    for seconds in ("0", "-1", "soon", "9" * 9):
        monkeypatch.setenv("DEFORMNET_DOWNLOAD_TIMEOUT", seconds)
        with pytest.raises(ValueError, match="DEFORMNET_DOWNLOAD_TIMEOUT to be 1 to 86400 sec"):
            backbone("resnet18", weights="IMAGENET1K_V1")


def test_frozen_stages_can_still_deform():
    model = backbone("resnet18", norm="frozen", deform_layers=16)
    assert not model.get_submodule("layer1.0.conv1").weight.requires_grad
    assert model.get_submodule("layer1.0.conv1.conv_offset").weight.requires_grad


def test_frozen_norm_is_batch_norm_in_evaluation():
    torch.manual_seed(0)
    trained = backbone("resnet18", reduce_channels=None).eval()
    randomize_norms(trained)
    frozen = backbone("resnet18", norm="frozen", reduce_channels=None)
    frozen.load_state_dict(trained.state_dict())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen.train()(images), trained(images))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert frozen(images).dtype == torch.bfloat16


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_weights():
    with pytest.raises(FileNotFoundError, match="IMAGENET1K_V1") as error:
        backbone("resnet18", weights="IMAGENET1K_V9")
    assert "IMAGENET1K_V9" in one_line(error)


def test_failed_download(monkeypatch):
    def get_state_dict(self, check_hash=False):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    message = r"cannot download IMAGENET1K_V1 from https.*no route"
    with pytest.raises(OSError, match=message) as error:
        backbone("resnet18", weights="IMAGENET1K_V1")
    one_line(error)


def test_a_pickled_module_is_no_checkpoint(tmp_path):
    path = saved(tmp_path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"damaged, or not a PyTorch checkpoint") as error:
        backbone("resnet18", weights=path)
    assert str(path) in one_line(error)


def test_weights_of_another_model(tmp_path):
    good = torchvision.models.resnet18().state_dict()
    linear = nn.Linear(2, 2).state_dict()
    larger = torchvision.models.resnet50().state_dict()
    part = "layer2.0.conv1.weight"
    wrong = {
        "a state dict, but got a dict with keys 'nets', 'epoch'": {"nets": good, "epoch": 3},
        "a state dict, but got list": [1, 2],
        r"weights of ResNet-18: missing key .* and \d+ more": linear,
        "weights of ResNet-18, but got ResNet-50: unexpected key layer1.0.conv3.weight": larger,
        rf"{part} to be \[128, 64, 3, 3\], but got \[1\]": {**good, part: torch.zeros(1)},
    }
    for message, state in wrong.items():
        path = saved(tmp_path, state)
        with pytest.raises(ValueError, match=f"expected {message}") as error:
            backbone("resnet18", weights=path)
        assert str(path) in one_line(error)


def test_run_with_other_strides_is_refused(tmp_path):
    model = backbone("resnet50", stride_in_1x1=True, reduce_channels=None)
    checkpoint = {
        "deformnet": {"recipe": {"backbone": "resnet50", "stride_in_1x1": True}},
        "model": {f"backbone.{k}": v for k, v in model.state_dict().items()},
    }
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints/last.ckpt")
    exported = tmp_path / "net.safetensors"
    exported.write_bytes(pack(checkpoint["model"], {"deformnet": "rfcn"}))
    exported.with_suffix(".json").write_text(json.dumps(checkpoint["deformnet"]))
    for weights in (tmp_path, tmp_path / "checkpoints/last.ckpt", exported):
        backbone("resnet50", stride_in_1x1=True, weights=weights)
        with pytest.raises(ValueError, match=r"trained with stride_in_1x1=False, but got True"):
            backbone("resnet50", weights=weights)
