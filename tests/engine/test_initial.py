"""What training starts from: a whole network, a backbone, checkpoints of other code bases."""

import dataclasses
import logging

import pytest
import torch
from processes import CPU, run, small
from torchvision.models import resnet18

from deformnet import UserError
from deformnet.engine import export_run, finetune_on, load_run
from deformnet.engine.initial import initial
from deformnet.models.backbones import backbone
from deformnet.recipes import DeepLabRecipe, RFCNRecipe

CLASSES = ("background", "disc", "square", "star", "trefoil", "ellipse", "gear")


@pytest.fixture(scope="module")
def trained(shapes, quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    run(dataclasses.replace(quick, iterations=1), shapes, out)
    return out


def assert_backbone(model, source):
    state = load_run(source).model.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone.") and ".reduce." not in name:
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "exported"])
def test_a_whole_network(trained, quick, tmp_path, kind):
    source = {"folder": trained, "checkpoint": trained / "checkpoints/last.ckpt"}.get(kind)
    if kind == "exported":
        export_run(trained, source := tmp_path / "network.safetensors")
    model, line = initial(dataclasses.replace(quick, init=str(source)), CLASSES)
    state = load_run(trained).model.state_dict()
    assert line == f"initial weights: {source}, backbone and head: {len(state)} tensors"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norms", [("trained", "frozen"), ("frozen", "trained")])
def test_a_whole_network_with_other_batch_norm(shapes, quick, tmp_path, norms):
    before, after = (dataclasses.replace(quick, norm=norm, iterations=1) for norm in norms)
    run(before, shapes, tmp_path)
    model, line = initial(dataclasses.replace(after, init=str(tmp_path)), CLASSES)
    assert "backbone and head" in line
    state = load_run(tmp_path).model.state_dict()
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, state[name]), name


def test_a_network_with_deformable_layers_from_a_plain_one(shapes, quick, tmp_path):
    plain = dataclasses.replace(quick.baseline(), iterations=1)
    run(plain, shapes, tmp_path)
    model, line = initial(dataclasses.replace(quick, init=str(tmp_path)), CLASSES)
    assert "backbone and head" in line
    offsets = [value for name, value in model.state_dict().items() if "conv_offset" in name]
    assert offsets
    assert not any(value.any() for value in offsets)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (CLASSES[:5], "the run has 7 classes, not 5"),
        ((*CLASSES[:6], "cog"), "the classes differ ('gear' in the run, 'cog' in the data)"),
    ],
)
def test_the_backbone_of_a_run_with_other_classes(trained, quick, classes, reason):
    model, line = initial(dataclasses.replace(quick, init=str(trained)), classes)
    assert line.startswith(f"initial weights: {trained}, backbone only (")
    assert line.endswith(f"because {reason}")
    assert_backbone(model, trained)


def test_the_backbone_of_another_network(trained):
    recipe = small(RFCNRecipe, init=str(trained), norm="trained")
    model, line = initial(recipe, CLASSES[1:])
    assert line.endswith("because the run trained deeplab, not rfcn")
    assert_backbone(model, trained)


def test_training_says_what_it_starts_from(trained, shapes, quick, tmp_path, caplog):
    recipe = dataclasses.replace(quick, init=str(trained), iterations=1)
    with caplog.at_level(logging.INFO, "deformnet"):
        run(recipe, shapes, tmp_path)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "data: 7 images to train on (train), no validation images"
    assert any(line.startswith(f"initial weights: {trained}, backbone and head") for line in lines)


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled and distributed": lambda state: {
        "model": {f"module._orig_mod.{name}": value for name, value in state.items()}
    },
    "backbone.": lambda state: {
        "state_dict": {
            **{f"model.backbone.{name}": value for name, value in state.items()},
            "model.head.weight": torch.zeros(3),
        }
    },
    "everything at once": lambda state: {
        "net": {
            "model_state_dict": {
                **{f"model.backbone._orig_mod.module.{k}": v for k, v in state.items()},
                "model.head.weight": torch.zeros(3),
            }
        }
    },
    "mmdetection 3": lambda state: {
        "meta": {},
        "state_dict": {
            **{f"backbone.{name}": value for name, value in state.items()},
            "data_preprocessor.mean": torch.zeros(3, 1, 1),
            "data_preprocessor.std": torch.ones(3, 1, 1),
        },
        "message_hub": {},
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_checkpoints_of_other_code_bases(tmp_path, kind):
    state = resnet18().state_dict()
    torch.save(WRAPPED[kind](state), path := tmp_path / "weights.pth")
    model = backbone("resnet18", weights=path)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items() if name in own)
    assert torch.equal(own["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_masks_of_dcn_v2_are_half_of_ours(tmp_path):
    state = resnet18().state_dict()
    layer, predicted = "layer4.1.conv2", torch.randn(27, 512, 3, 3)
    state[f"{layer}.conv_offset_mask.weight"] = predicted
    state[f"{layer}.conv_offset_mask.bias"] = predicted[:, 0, 0, 0].clone()
    torch.save({"state_dict": state}, path := tmp_path / "weights.pth")
    own = backbone("resnet18", deform_layers=1, modulated=True, weights=path).state_dict()
    assert torch.equal(own[f"{layer}.conv_offset.weight"], predicted)
    assert torch.equal(own[f"{layer}.weight"], state[f"{layer}.weight"] / 2)
    assert torch.equal(own["layer4.1.conv1.weight"], state["layer4.1.conv1.weight"])


def test_half_of_the_keys_renamed(tmp_path):
    state = {
        name.replace("layer", "stage") if "conv" in name else name: value
        for name, value in resnet18().state_dict().items()
    }
    torch.save(state, path := tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        backbone("resnet18", weights=path)
    assert str(error.value) == (
        f"{path}: expected weights of ResNet-18: missing key layer1.0.conv1.weight and 15 more, "
        "and it has 16 unexpected keys, such as stage1.0.conv1.weight; rename them, or use "
        "`deformnet weights import` for a checkpoint of mmdetection or detectron2"
    )


def test_a_checkpoint_whose_masks_differ_is_refused(tmp_path):
    state = {f"backbone.{name}": value for name, value in resnet18().state_dict().items()}
    state["backbone.layer4.1.conv2.conv_offset.weight"] = torch.zeros(27, 512, 3, 3)
    torch.save({"state_dict": state, "meta": {}}, path := tmp_path / "weights.pth")
    with pytest.raises(UserError, match="convert it with `deformnet weights import mmdetection`"):
        backbone("resnet18", weights=path)


def test_settings_for_a_data_set(shapes):
    recipe = finetune_on(DeepLabRecipe, shapes, hardware=CPU)
    assert (recipe.batch, recipe.short_side, recipe.iterations) == (3, 160, 1000)
