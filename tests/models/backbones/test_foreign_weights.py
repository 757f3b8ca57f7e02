"""Weights of mmdetection and detectron2: their key lists, and networks that must not change."""

import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from backbone_testing import bare, torchvision_resnet
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from deformnet.cli import main
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from deformnet.models.backbones import backbone
from deformnet.models.backbones.foreign import from_detectron2, from_mmdetection, read_checkpoint
from deformnet.models.backbones.weights import load_weights, read_weights
from deformnet.recipes import DeepLabRecipe

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")
PLAIN, MODULATED = 18, 27  # channels that make the offsets of one group
C3_TO_C5 = (2, 3, 4)
MM_COUNTS = {50: 53, 101: 104}  # batch norm layers


def conv(shapes, name, *shape, bias=True):
    shapes[f"{name}.weight"] = shape
    if bias:
        shapes[f"{name}.bias"] = shape[:1]


def blocks(depth):
    """Stage, block, channels in, inside and out of every bottleneck."""
    inputs = 64
    for stage, count in enumerate(BLOCKS[depth], 1):
        width = 32 * 2**stage
        for block in range(count):
            yield stage, block, inputs, width, 4 * width
            inputs = 4 * width


def mmdetection_keys(depth, offsets, stages, old_spelling=False):
    """Names and shapes of mmdetection's Faster R-CNN with a feature pyramid."""
    shapes = {}

    def normed(name, norm, *shape):
        conv(shapes, name, *shape, bias=False)
        shapes.update({f"{norm}.{part}": shape[:1] for part in NORM})
        shapes[f"{norm}.num_batches_tracked"] = ()

    normed("backbone.conv1", "backbone.bn1", 64, 3, 7, 7)
    for stage, block, inputs, width, outputs in blocks(depth):
        name = f"backbone.layer{stage}.{block}"
        normed(f"{name}.conv1", f"{name}.bn1", width, inputs, 1, 1)
        normed(f"{name}.conv2", f"{name}.bn2", width, width, 3, 3)
        if stage in stages:
            offset = "conv2_offset" if old_spelling else "conv2.conv_offset"
            conv(shapes, f"{name}.{offset}", offsets, width, 3, 3)
        normed(f"{name}.conv3", f"{name}.bn3", outputs, width, 1, 1)
        if block == 0:
            normed(f"{name}.downsample.0", f"{name}.downsample.1", outputs, inputs, 1, 1)
    for level in range(4):
        conv(shapes, f"neck.lateral_convs.{level}.conv", 256, 256 * 2**level, 1, 1)
        conv(shapes, f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
    conv(shapes, "rpn_head.rpn_conv", 256, 256, 3, 3)
    conv(shapes, "rpn_head.rpn_cls", 3, 256, 1, 1)
    conv(shapes, "rpn_head.rpn_reg", 12, 256, 1, 1)
    head = "bbox_head" if old_spelling else "roi_head.bbox_head"
    conv(shapes, f"{head}.fc_cls", 81, 1024)
    conv(shapes, f"{head}.fc_reg", 320, 1024)
    conv(shapes, f"{head}.shared_fcs.0", 1024, 12544)
    conv(shapes, f"{head}.shared_fcs.1", 1024, 1024)
    return shapes


def detectron2_keys(depth, offsets, stages):
    """Names and shapes of detectron2's Faster R-CNN with a feature pyramid, frozen batch norm."""
    shapes = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}

    def normed(name, *shape):
        conv(shapes, name, *shape, bias=False)
        shapes.update({f"{name}.norm.{part}": shape[:1] for part in NORM})

    for level in range(2, 6):
        conv(shapes, f"backbone.fpn_lateral{level}", 256, 64 * 2**level, 1, 1)
        conv(shapes, f"backbone.fpn_output{level}", 256, 256, 3, 3)
    normed("backbone.bottom_up.stem.conv1", 64, 3, 7, 7)
    for stage, block, inputs, width, outputs in blocks(depth):
        name = f"backbone.bottom_up.res{stage + 1}.{block}"
        if block == 0:
            normed(f"{name}.shortcut", outputs, inputs, 1, 1)
        normed(f"{name}.conv1", width, inputs, 1, 1)
        if stage in stages:
            conv(shapes, f"{name}.conv2_offset", offsets, width, 3, 3)
        normed(f"{name}.conv2", width, width, 3, 3)
        normed(f"{name}.conv3", outputs, width, 1, 1)
    conv(shapes, "proposal_generator.rpn_head.conv", 256, 256, 3, 3)
    conv(shapes, "proposal_generator.rpn_head.objectness_logits", 3, 256, 1, 1)
    conv(shapes, "proposal_generator.rpn_head.anchor_deltas", 12, 256, 1, 1)
    for level in range(5):
        shapes[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = (3, 4)
    conv(shapes, "roi_heads.box_head.fc1", 1024, 12544)
    conv(shapes, "roi_heads.box_head.fc2", 1024, 1024)
    conv(shapes, "roi_heads.box_predictor.cls_score", 81, 1024)
    conv(shapes, "roi_heads.box_predictor.bbox_pred", 320, 1024)
    return shapes


def filled(shapes):
    """Tensors of these shapes that take no memory; detectron2's own mean and deviation."""
    state = {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}
    if "pixel_mean" in state:
        state["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    return state


def fits(converted, model):
    """Whether the converted weights are exactly what a network needs, in names and shapes."""
    own = {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked") and not key.startswith("reduce.")
    }
    return own == {key: value.shape for key, value in converted.state.items()}


def ignored_counts(converted):
    return {reason: len(keys) for reason, keys in converted.ignored.items()}


@pytest.mark.parametrize(
    ("depth", "offsets", "old_spelling", "groups"),
    [(50, PLAIN, False, 1), (50, PLAIN, True, 1), (101, MODULATED, False, 1),
     (50, 4 * MODULATED, False, 4), (50, 4 * PLAIN, False, 4)],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module."])
def test_all_keys_of_mmdetection(depth, offsets, old_spelling, groups, prefix):
    shapes = mmdetection_keys(depth, offsets, C3_TO_C5, old_spelling)
    state = {prefix + key: value for key, value in filled(shapes).items()}
    checkpoint = {"meta": {"epoch": 12}, "state_dict": state, "optimizer": {}}
    converted = from_mmdetection(checkpoint)
    layers = {50: 13, 101: 30}[depth]
    modulated = offsets % MODULATED == 0
    assert len(converted.deformable) == converted.deform_layers == layers
    assert (converted.offset_groups, converted.modulated) == (groups, modulated)
    assert converted.backbone == f"ResNet-{depth}"
    counts = ignored_counts(converted)
    expected = {"neck": 16, "heads": 14, "training state": 2}
    assert counts == {"batch counts": MM_COUNTS[depth], **expected}
    assert len(state) + 2 == len(converted.state) + sum(counts.values())
    model = bare(f"resnet{depth}", deform_layers=layers, offset_groups=groups, modulated=modulated)
    assert fits(converted, model)


@pytest.mark.parametrize(("offsets", "modulated"), [(PLAIN, False), (MODULATED, True)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_all_keys_of_detectron2(offsets, modulated, prefix):
    state = filled(detectron2_keys(50, offsets, C3_TO_C5))
    state = {prefix + key: value for key, value in state.items()}
    converted = from_detectron2({"model": state, "optimizer": {}, "iteration": 1})
    assert (converted.deform_layers, converted.modulated) == (13, modulated)
    counts = ignored_counts(converted)
    assert counts == {
        "image normalization": 2,
        "feature pyramid": 16,
        "proposal network": 11,
        "heads": 8,
        "training state": 2,
    }
    assert len(state) + 2 == len(converted.state) + sum(counts.values())
    assert fits(converted, bare("resnet50", deform_layers=13, modulated=modulated))


def without_pyramid(state):
    """A detectron2 model on conv4, whose last stage is in the head."""
    for key, value in state.items():
        if key.startswith("backbone.bottom_up.res5."):
            yield key.replace("backbone.bottom_up.", "roi_heads."), value
        elif not key.startswith(("backbone.fpn_", "roi_heads.box_head.")):
            yield key.replace("backbone.bottom_up.", "backbone."), value


def test_detectron2_with_the_last_stage_in_the_head():
    state = dict(without_pyramid(filled(detectron2_keys(50, PLAIN, C3_TO_C5))))
    assert "roi_heads.res5.2.conv2_offset.bias" in state
    converted = from_detectron2(state)
    assert fits(converted, bare("resnet50", deform_layers=13))
    assert len(converted.ignored["heads"]) == 4


def test_mmdetection_with_the_last_stage_in_the_head():
    state = {
        key.replace("backbone.layer4.", "roi_head.shared_head.layer4."): value
        for key, value in filled(mmdetection_keys(50, PLAIN, ())).items()
        if not key.startswith("neck.")
    }
    assert fits(from_mmdetection(state), bare("resnet50"))


@pytest.mark.parametrize("last", ["backbone.body.", "roi_heads.box.feature_extractor.head."])
def test_maskrcnn_benchmark(last):
    state = {}
    for key, value in filled(mmdetection_keys(50, MODULATED, C3_TO_C5)).items():
        if not key.startswith("backbone.") or key.endswith("num_batches_tracked"):
            continue
        key = key.removeprefix("backbone.")
        if key.startswith(("conv1.", "bn1.")):
            key = f"stem.{key}"
        if key.startswith(("layer2.", "layer3.", "layer4.")):
            key = key.replace(".conv2.weight", ".conv2.conv.weight")
            key = key.replace(".conv2.conv_offset.", ".conv2.offset.")
        place = last if key.startswith("layer4.") else "backbone.body."
        state[f"module.{place}{key}"] = value
    state["module.backbone.fpn.fpn_inner2.weight"] = torch.ones(1)
    state["module.rpn.head.conv.weight"] = torch.ones(1)
    state["module.roi_heads.box.predictor.cls_score.weight"] = torch.ones(1)
    converted = from_detectron2({"model": state, "optimizer": {}})
    assert fits(converted, bare("resnet50", deform_layers=13, modulated=True))
    reasons = ("feature pyramid", "proposal network", "heads", "training state")
    assert ignored_counts(converted) == dict.fromkeys(reasons, 1)


def test_a_backbone_alone_and_a_classifier():
    state = torchvision.models.resnet18(weights=None).state_dict()
    converted = from_mmdetection(state)
    assert converted.ignored["classifier"] == ["fc.weight", "fc.bias"]
    assert (converted.deform_layers, converted.deformable) == (0, [])
    assert fits(converted, bare("resnet18"))
    for key, value in converted.state.items():
        assert torch.equal(value, state[key]), key


def test_layers_are_counted_from_the_end_of_the_network():
    # Deformable in conv4 alone, but for its first block: 5 layers, the last 8 reach that far.
    shapes = mmdetection_keys(50, PLAIN, (3,))
    shapes = {k: v for k, v in shapes.items() if "layer3.0.conv2.conv_offset" not in k}
    converted = from_mmdetection(filled(shapes))
    assert (len(converted.deformable), converted.deform_layers) == (5, 8)
    load_weights(backbone("resnet50", deform_layers=8), converted.state, "converted")


# Networks.


class TheirDeformable(nn.Module):
    """A deformable layer as mmcv and detectron2 compute it, on torchvision's operator."""

    def __init__(self, plain, groups, modulated):
        super().__init__()
        self.weight = plain.weight
        self.stride, self.padding, self.modulated = plain.stride, plain.padding, modulated
        channels = (3 if modulated else 2) * 9 * groups
        self.conv_offset = nn.Conv2d(
            plain.in_channels, channels, 3, plain.stride, plain.padding, dtype=torch.float64
        )

    def forward(self, x):
        offset, mask = self.conv_offset(x), None
        if self.modulated:
            first, second, mask = offset.chunk(3, dim=1)
            offset, mask = torch.cat((first, second), dim=1), mask.sigmoid()
        return torchvision.ops.deform_conv2d(
            x, offset, self.weight, None, self.stride, self.padding, mask=mask
        )


def their_network(groups=1, modulated=False, deformable=True):
    """A ResNet-50, deformable in conv3 to conv5, in float64."""
    model = torchvision_resnet(50)
    if deformable:
        for stage in (model.layer2, model.layer3, model.layer4):
            for block in stage:
                block.conv2 = TheirDeformable(block.conv2, groups, modulated)
    return model


def features(model, images):
    """conv4 and conv5 of a torchvision ResNet."""
    with torch.no_grad():
        return IntermediateLayerGetter(model, {"layer3": "4", "layer4": "5"})(images).values()


def as_mmdetection(state):
    return {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}


def as_detectron2(state):
    """torchvision's names as detectron2's."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("fc.") or key.endswith("num_batches_tracked"):
            continue
        if not key.startswith("layer"):
            key = f"stem.{key}"
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        key = key.replace("conv2.conv_offset.", "conv2_offset.")
        renamed[f"backbone.bottom_up.{key}"] = value
    return renamed


def ours(converted, **arguments):
    """Our network with converted weights, in float64 and at the stride of theirs."""
    model = backbone(
        converted.backbone.lower().replace("-", ""),
        deform_layers=converted.deform_layers,
        offset_groups=converted.offset_groups,
        modulated=converted.modulated,
        output_stride=32,
        reduce_channels=None,
        **arguments,
    )
    load_weights(model.double().eval(), converted.state, "converted")
    return model


RGB = {"bgr": False, "pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}


@pytest.mark.parametrize(
    ("code_base", "groups", "modulated"),
    [
        ("mmdetection", 1, False),
        ("mmdetection", 4, True),
        ("detectron2", 1, True),
        ("detectron2", 2, False),
    ],
)
def test_features_are_theirs(code_base, groups, modulated):
    theirs = their_network(groups, modulated)
    if code_base == "mmdetection":
        converted = from_mmdetection(as_mmdetection(theirs.state_dict()))
    else:
        converted = from_detectron2(as_detectron2(theirs.state_dict()), **RGB)
    assert (converted.deform_layers, converted.offset_groups) == (13, groups)
    model = ours(converted)
    images = torch.randn(1, 3, 70, 64, dtype=torch.float64)
    with torch.no_grad():
        for mine, other in zip(model.stages(images), features(theirs, images), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    # The mask decides: without the factor, the features are others.
    if modulated:
        for layer in converted.deformable:
            model.get_submodule(layer).weight.data.mul_(2)
        with torch.no_grad():
            assert not torch.allclose(model.stages(images)[1], mine, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("bgr", "std"),
    [(True, (1.0, 1.0, 1.0)), (True, (57.375, 57.12, 58.395)), (False, (58.395, 57.12, 57.375))],
)
@pytest.mark.parametrize("convert", [from_mmdetection, from_detectron2])
def test_the_same_image_gives_the_same_features(bgr, std, convert):
    theirs = their_network(deformable=False)
    # Pixels with a deviation of 1 would blow up features that were trained on smaller numbers.
    theirs.conv1.weight.data /= torch.tensor(58.0 if std[0] == 1 else 1.0)
    mean = (103.53, 116.28, 123.675) if bgr else (123.675, 116.28, 103.53)
    image = torch.randint(0, 256, (1, 3, 70, 64)).double()  # RGB

    seen = (image.flip(1) if bgr else image).clone()
    seen -= torch.tensor(mean).double().view(3, 1, 1)
    seen /= torch.tensor(std).double().view(3, 1, 1)
    expected = features(theirs, seen)

    rename = as_mmdetection if convert is from_mmdetection else as_detectron2
    converted = convert(rename(theirs.state_dict()), bgr=bgr, pixel_mean=mean, pixel_std=std)
    mean, std = torch.tensor(IMAGENET_MEAN).double(), torch.tensor(IMAGENET_STD).double()
    with torch.no_grad():
        found = ours(converted).stages((image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    if not bgr:
        assert torch.equal(converted.state["conv1.weight"], theirs.conv1.weight)


def test_detectron2_takes_bgr_and_mmdetection_rgb_by_default():
    state = their_network(deformable=False).state_dict()
    assert torch.equal(from_mmdetection(state).state["conv1.weight"], state["conv1.weight"])
    folded = from_detectron2(as_detectron2(state)).state["conv1.weight"]
    scale = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(folded, state["conv1.weight"].flip(1) * scale)


def test_arrays_are_as_good_as_tensors():
    state = as_detectron2(torchvision.models.resnet18(weights=None).state_dict())
    arrays = {key: value.numpy() for key, value in state.items()}
    assert fits(from_detectron2({"model": arrays, "__author__": "zoo"}), bare("resnet18"))


def test_there_and_back():
    torch.manual_seed(0)
    model = backbone("resnet50", deform_layers=13, reduce_channels=None, output_stride=32)
    for layer in model.modules():
        if hasattr(layer, "conv_offset"):
            nn.init.normal_(layer.conv_offset.weight)
            nn.init.normal_(layer.conv_offset.bias)
    state = model.state_dict()
    for converted in (
        from_mmdetection(as_mmdetection(state)),
        from_detectron2(as_detectron2(state), **RGB),
    ):
        assert fits(converted, model)
        for key, value in converted.state.items():
            assert torch.equal(value, state[key]), key


# What must be refused.


@pytest.mark.parametrize(
    ("key", "convert"),
    [
        ("backbone.layer2.0.context_block.channel_add_conv.0.weight", from_mmdetection),
        ("backbone.stem.0.weight", from_mmdetection),
        ("backbone.layer1.0.conv4.weight", from_mmdetection),
        ("backbone.layer1.0.conv1.bias", from_mmdetection),
        ("teacher.backbone.conv1.weight", from_mmdetection),
        ("roi_head.shared_head.layer4.0.gate.weight", from_mmdetection),
        ("encoder.layers.0.weight", from_mmdetection),
        ("backbone.bottom_up.stem.conv1_1.weight", from_detectron2),
        ("backbone.bottom_up.res2.0.conv1.norm.eps", from_detectron2),
        ("backbone.bottom_up.res6.0.conv1.weight", from_detectron2),
        ("roi_heads.res5.0.gate.weight", from_detectron2),
        ("res2_0_branch2a_w", from_detectron2),
    ],
)
def test_a_key_that_is_unexpected(key, convert):
    state = {key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"unexpected key {re.escape(key)};") as error:
        convert(state)
    assert "\n" not in str(error.value)


def test_unsupported_checkpoints():
    state = filled(mmdetection_keys(50, PLAIN, C3_TO_C5))
    wrong = {
        "expected a complete ResNet-18, 34, 50 or 101, but got no blocks": {"neck.0.weight": state},
        r"but got 3 blocks in layer1, 4 blocks in layer2, 6 blocks in layer3$": {
            k: v for k, v in state.items() if not k.startswith("backbone.layer4.")
        },
        "backbone.conv1.weight and conv1.weight both map to conv1.weight": {
            **state, "conv1.weight": torch.ones(64, 3, 7, 7)
        },
        "backbone.layer4.0.conv2.conv_offset.weight to output .* channels, .* but got 12": {
            **state, "backbone.layer4.0.conv2.conv_offset.weight": torch.ones(12, 512, 3, 3)
        },
        r"layer2.0.* and backbone.layer4.0.conv2.conv_offset.weight differ in offset groups": {
            **state, "backbone.layer4.0.conv2.conv_offset.weight": torch.ones(27, 512, 3, 3)
        },
    }  # fmt: skip
    for message, checkpoint in wrong.items():
        with pytest.raises(ValueError, match=message):
            from_mmdetection(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_mean": (127.5,) * 3}, "pixel_mean to be 103.53, 116.28, 123.675 to"),
        ({"bgr": False}, "pixel_mean to be 123.675, 116.28, 103.53 to within 1, but got 103.53"),
        ({"pixel_std": (1, 0, 1)}, "pixel_std to be 3 positive numbers, but got 1, 0, 1"),
        (
            {"pixel_std": (2, 2, 2)},
            "pixel_std to be that of the checkpoint, 1, 1, 1, but got 2, 2, 2",
        ),
    ],
)
def test_other_preprocessing(arguments, message):
    state = filled(detectron2_keys(50, PLAIN, C3_TO_C5))
    with pytest.raises(ValueError, match=f"expected {message}"):
        from_detectron2({"model": state}, **arguments)
    # Detectron's older mean differs by less than a gray level.
    del state["pixel_mean"]
    from_detectron2(state, pixel_mean=(102.9801, 115.9465, 122.7717))


def test_keys_of_dcn_v2():
    state = filled(mmdetection_keys(50, MODULATED, C3_TO_C5))
    renamed = {k.replace("conv_offset.", "conv_offset_mask."): v for k, v in state.items()}
    assert renamed.keys() != state.keys()
    ours, theirs = from_mmdetection(state), from_mmdetection(renamed)
    assert ours.state.keys() == theirs.state.keys()
    assert theirs.modulated


def test_preprocessing_of_mmdetection_3():
    state = filled(mmdetection_keys(50, PLAIN, C3_TO_C5))
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    state = {
        **{f"module._orig_mod.{key}": value for key, value in state.items()},
        "module._orig_mod.data_preprocessor.mean": torch.tensor(mean).view(3, 1, 1),
        "module._orig_mod.data_preprocessor.std": torch.tensor(std).view(3, 1, 1),
    }
    converted = from_mmdetection({"state_dict": state, "meta": {}, "message_hub": {}})
    assert len(converted.ignored["image normalization"]) == 2
    with pytest.raises(
        ValueError, match=r"expected pixel_std to be that of the checkpoint, 58\.395"
    ):
        from_mmdetection({"state_dict": state}, pixel_std=(1, 1, 1))


OBJECTS = {"state_dict": {"a": torch.ones(1)}, "meta": {"log": OrderedDict, "x": print}}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"no checkpoint", "a.pth", "damaged, or contains Python objects.*weights_only=False"),
        (b"", "a.pth", "damaged, or contains Python objects"),
        (OBJECTS, "a.pth", r"damaged, or contains Python objects.*\[\"state_dict\"\]"),
        (b"no checkpoint", "a.safetensors", "damaged, or not a safetensors file"),
        (b"no checkpoint", "a.pkl", "a pickle of Python objects.*torch.as_tensor"),
        ([1], "a.pth", "expected a state dict, but got list"),
        (None, "a.pth", "no such file"),
    ],
)
def test_unreadable_files(tmp_path, content, name, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_how_to_save_a_pickle_again(tmp_path):
    """What the message says to do, done."""
    state = as_detectron2(torchvision.models.resnet18(weights=None).state_dict())
    model = {key: value.numpy() for key, value in state.items()}
    with (tmp_path / "model.pkl").open("wb") as file:
        pickle.dump({"model": model, "__author__": "zoo", "scale": np.float32(1)}, file)
    with pytest.raises(ValueError, match="pickle") as error:
        read_checkpoint(tmp_path / "model.pkl")
    command = re.search(r"torch\.save\(.*", str(error.value))[0]
    command = command.replace("FILE", repr(str(tmp_path / "model.pkl")))
    command = command.replace('"weights.pth"', repr(str(tmp_path / "weights.pth")))
    exec(command, {"torch": torch, "pickle": pickle})
    assert fits(from_detectron2(read_checkpoint(tmp_path / "weights.pth")), bare("resnet18"))


# The command.


def test_import_weights(tmp_path, capsys):
    state = as_mmdetection(torchvision.models.resnet18(weights=None).state_dict())
    state["neck.lateral_convs.0.conv.weight"] = torch.ones(1)
    file, out = tmp_path / "theirs.pth", tmp_path / "ours.safetensors"
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, file)
    main(["weights", "import", "mmdetection", str(file), str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ResNet-18: 100 tensors in {out}"
    assert "skipped, neck: 1 (neck.lateral_convs.0.conv.weight)" in lines
    assert "skipped, batch counts: 20 (backbone.bn1.num_batches_tracked, ...)" in lines
    assert "deformable layers: none" in lines
    assert "--backbone resnet18 --deform-layers 0 --init" in lines[-1]
    recipe = DeepLabRecipe(backbone="resnet18", deform_layers=2, init=str(out))
    weight = recipe.build_model(3).get_submodule("backbone.conv1").weight
    assert torch.equal(weight, state["backbone.conv1.weight"])


def test_import_weights_with_many_deformable_layers(tmp_path, capsys):
    state = their_network(groups=2, modulated=True).float().state_dict()
    file, out = tmp_path / "theirs.pth", tmp_path / "ours.safetensors"
    torch.save({"model": as_detectron2(state)}, file)
    main(["weights", "import", "detectron2", str(file), str(out)])
    *_, layers, strides, how = capsys.readouterr().out.splitlines()
    assert layers == (
        "deformable layers: 13 among the last 13 3x3 convolutions, offset_groups=2, modulated=True"
    )
    assert "--stride-in-1x1" in strides
    options = "--backbone resnet50 --deform-layers 13 --offset-groups 2 --modulated"
    assert f"{options} --init {out} " in how
    recipe = DeepLabRecipe(
        backbone="resnet50", deform_layers=13, offset_groups=2, modulated=True, init=str(out)
    )
    model = recipe.build_model(3).backbone
    read = read_weights(out)
    assert torch.equal(model.layer4[0].conv2.weight, state["layer4.0.conv2.weight"] / 2)
    assert set(read) <= set(model.state_dict())


def test_import_weights_complains_in_one_line(tmp_path, capsys):
    file = tmp_path / "theirs.pth"
    torch.save({"backbone.what": torch.ones(1)}, file)
    for arguments, message in (
        ([str(file), str(tmp_path / "o.safetensors")], "unexpected key backbone.what"),
        ([str(tmp_path / "no.pth"), str(tmp_path / "o.safetensors")], "no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["weights", "import", "detectron2", *arguments])
        error = capsys.readouterr().err.strip()
        assert ended.value.code == 2
        assert message in error
        assert "\n" not in error
    assert not (tmp_path / "o.safetensors").exists()
