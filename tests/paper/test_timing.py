"""The timings of `deformnet paper` at toy size: reports and rejected options."""

import json
import statistics
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deformnet.paper.timing
from deformnet.cli import main
from deformnet.models import Candidates
from deformnet.nn import DeformConv2d
from deformnet.nn.offsets import OffsetConv2d
from deformnet.paper.cases import OFFSETS, build, case, forward, require_sound
from deformnet.paper.measuring import autocast
from deformnet.paper.settings import TimingOptions

TOY = ["--backbone", "resnet18", "--scale", "0.1", "--rounds", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch):
    monkeypatch.setattr(deformnet.paper.timing, "WARM_UP_SECONDS", 0)


def check_times(times):
    plain, deformable = times["plain"]["rounds"], times["deformable"]["rounds"]
    ratios = [b / a for a, b in zip(plain, deformable, strict=True)]
    assert len(ratios) == 3
    assert times["plain"]["median"] == statistics.median(plain)
    assert times["ratio"]["median"] == statistics.median(ratios)
    assert times["ratio"]["p20"] <= times["ratio"]["median"] <= times["ratio"]["p80"]


def test_table4(tmp_path, capsys):
    out = tmp_path / "results" / "table4.json"
    threads = torch.get_num_threads()
    main(["paper", "table4", *TOY, "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["conditions"]["scale"] == 0.1
    assert found["conditions"]["threads"] == 1
    assert torch.get_num_threads() == threads
    assert "--scale 0.1" in printed
    assert "of 5 ratios are below the paper's" in printed

    rows = {row["network"]: row for row in found["rows"]}
    # Table 4: seconds of the deformable network over those of the plain one.
    paper = {
        "deeplab-cityscapes": (0.656 / 0.610, 0.696 / 0.650),
        "deeplab-voc": (0.088 / 0.084, 0.098 / 0.094),
        "class-aware-rpn": (0.152 / 0.142, 0.334 / 0.323),
        "faster-rcnn": (0.192 / 0.147, 0.234 / 0.190),
        "rfcn": (0.169 / 0.143, 0.193 / 0.170),
    }
    assert list(rows) == list(paper)
    for name, row in rows.items():
        check_times(row["forward"])
        check_times(row["whole"])
        assert row["forward"]["paper_ratio"] == pytest.approx(paper[name][0])
        assert row["whole"]["paper_ratio"] == pytest.approx(paper[name][1])
        assert row["flops"]["plain"] < row["flops"]["deformable"] < 2 * row["flops"]["plain"]
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert f"{row['forward']['ratio']['median']:.2f} (" in line
        assert f"{row['parameters']['deformable'] / 1e6:.2f}" in line
    assert rows["deeplab-cityscapes"]["image"] == [102, 205]  # rounded each by itself
    assert rows["rfcn"]["image"] == [60, 100]
    assert rows["deeplab-voc"]["boxes"] is None
    assert rows["rfcn"]["boxes"] >= 1

    # Three 3x3 convolutions of 18 channels on 512.
    added = {name: row["parameters"] for name, row in rows.items()}
    assert added["deeplab-voc"]["deformable"] - added["deeplab-voc"]["plain"] == 3 * 18 * 4609


class Calls(TorchDispatchMode):
    """Counts calls of operators by name and dtype of the first argument."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0].replace("convolution", "conv2d")
        self.counts[name, getattr(args[0], "dtype", None) if args else None] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "command",
    [
        ["table4", "--rows", "deeplab-voc", "rfcn"],
        ["training-step", "--network", "faster-rcnn"],
        ["training-step", "--network", "rfcn"],
    ],
    ids=" ".join,
)
def test_mixed_precision(command, tmp_path, capsys):
    out = tmp_path / "a.json"
    arguments = ["paper", *command, *TOY, "--precision", "bf16-mixed", "--out", str(out)]
    with Calls() as found:
        main(arguments)
    assert json.loads(out.read_text())["conditions"]["precision"] == "bf16-mixed"
    assert "random pixels, precision bf16-mixed;" in capsys.readouterr().out
    # Convolutions that compute offsets, or run while networks are built, stay in float32.
    counts = found.counts
    assert counts["conv2d", torch.bfloat16] > counts["conv2d", torch.float32]
    assert counts["deform_conv2d", torch.bfloat16] > counts["deform_conv2d", torch.float32]
    if "training-step" in command:
        low, high = (counts["conv2d_backward", it] for it in (torch.bfloat16, torch.float32))
        assert low > high > 0


def test_float32_is_the_default():
    with autocast(TimingOptions()):
        assert not torch.is_autocast_enabled("cpu")


def test_table4_of_selected_networks(capsys):
    main(["paper", "table4", *TOY, "--rows", "rfcn"])
    assert "1 ratios are below the paper's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "pools"),
    [
        ("deeplab-voc", []),
        ("faster-rcnn", ["deform_pool"]),
        ("rfcn", ["score_pool", "box_pool"]),
    ],
)
def test_training_step(network, pools, tmp_path, capsys):
    out = tmp_path / "step.json"
    if not pools:  # the results of an earlier run are replaced
        keys = ("conditions", "network", "image", "step", "layers")
        out.write_text(json.dumps(dict.fromkeys(keys)))
    main(["paper", "training-step", *TOY, "--network", network, "--out", str(out)])
    found = json.loads(out.read_text())
    check_times(found["step"])
    convolutions = [f"backbone.layer4.{place}" for place in ("0.conv2", "1.conv1", "1.conv2")]
    assert [layer["name"] for layer in found["layers"]] == [*convolutions, *pools]
    printed = capsys.readouterr().out.splitlines()
    for layer in found["layers"]:
        check_times(layer)
        (line,) = (line for line in printed if line.startswith(layer["name"]))
        assert ("above 1.5" in line) == (layer["ratio"]["median"] > 1.5)


def test_networks_share_weights_and_offsets_are_not_zero():
    options = TimingOptions(backbone="resnet18", scale=0.2)
    networks = build(case("faster-rcnn", options), torch.device("cpu"))
    plain, deformable = networks.plain, networks.deformable
    weights = deformable.model.state_dict()
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)
    spreads = []
    for layer in deformable.model.modules():
        if isinstance(layer, OffsetConv2d):
            layer.register_forward_hook(lambda *call: spreads.append(float(call[2].std())))
    with torch.no_grad():
        require_sound("plain", forward(plain, networks.prepared))
        require_sound("deformable", forward(deformable, networks.prepared))
    assert spreads == pytest.approx([OFFSETS] * 3, rel=0.01)
    assert not any(module.training for module in deformable.model.modules())
    assert not any(isinstance(module, DeformConv2d) for module in plain.model.modules())


def test_degenerate_outputs_are_not_timed():
    with pytest.raises(FloatingPointError, match="rfcn"):
        require_sound("rfcn", torch.tensor([1.0, torch.nan]))
    with pytest.raises(RuntimeError, match="no boxes"):
        require_sound("rfcn", [Candidates(torch.zeros(0, 4), torch.zeros(0, 20))])


def test_rejected_options(complaint, tmp_path):
    for message, *command in (
        ("expected scale to be between 0.1 and 1, but got 2.0", "table4", "--scale", 2),
        ("rounds", "training-step", "--rounds", 0),
        ("at least one network", "table4", "--rows"),
        ("threads", "table4", "--threads", 0),
        (str(tmp_path), "table4", "--out", tmp_path),
    ):
        assert message in complaint("paper", *command)


@pytest.mark.parametrize("command", ["table4", "training-step"])
@pytest.mark.parametrize("content", ["notes", '{"conditions": {}}', "[1]"])
def test_other_files_are_not_replaced(command, content, complaint, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    line = complaint("paper", command, *TOY, "--out", path)
    assert line.startswith(f"{path}: expected a new file or the results of an earlier run, but got")
    assert path.read_text() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(complaint):
    assert "cuda" in complaint("paper", "table4", "--device", "cuda")
