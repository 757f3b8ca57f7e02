"""Weights that mmdetection or detectron2 trained, under torchvision's names.

The ResNets of both are torchvision's under other names. What differs beside the names is folded
into the weights, so that the features are the same:

- the mask of modulated deformable layers: theirs is sigmoid(.), ours 2*sigmoid(.); half of the
  layer's weights give the same output.
- what the first convolution sees: theirs may be pixels from 0 to 255 in BGR, less a mean; ours are
  RGB divided by a deviation as well.

Where the blocks stride is in neither names nor shapes, and is not converted: weights of
mmdetection's style="caffe" and of detectron2's STRIDE_IN_1X1 (its default) belong into
`resnet(stride_in_1x1=True)`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deformnet.models.backbones.weights import architecture, read_safetensors

# What our networks subtract from the channels R, G, B of pixels from 0 to 255, and divide by.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)

_Rules = tuple[tuple[str, str], ...]

_NORM = r"(weight|bias|running_mean|running_var)"
_COUNT = r"num_batches_tracked"
_BLOCK = r"(layer[1-4]\.\d+)"
# Names inside of a ResNet, as patterns, and what they become.
_TORCHVISION: _Rules = (
    (r"conv1\.weight", "conv1.weight"),
    (rf"bn1\.{_NORM}", r"bn1.\1"),
    (rf"{_BLOCK}\.conv([123])\.weight", r"\1.conv\2.weight"),
    (rf"{_BLOCK}\.bn([123])\.{_NORM}", r"\1.bn\2.\3"),
    (rf"{_BLOCK}\.downsample\.0\.weight", r"\1.downsample.0.weight"),
    (rf"{_BLOCK}\.downsample\.1\.{_NORM}", r"\1.downsample.1.\2"),
)
_MMDETECTION: _Rules = (
    *_TORCHVISION,
    (rf"{_BLOCK}\.conv([12])\.conv_offset\.(weight|bias)", r"\1.conv\2.conv_offset.\3"),
    # Before mmcv's layers had a version 2.
    (rf"{_BLOCK}\.conv([12])_offset\.(weight|bias)", r"\1.conv\2.conv_offset.\3"),
)
_STAGE = r"(res[2-5]\.\d+)"
_DETECTRON2: _Rules = (
    (r"stem\.conv1\.weight", "conv1.weight"),
    (rf"stem\.conv1\.norm\.{_NORM}", r"bn1.\1"),
    (rf"{_STAGE}\.conv([123])\.weight", r"\1.conv\2.weight"),
    (rf"{_STAGE}\.conv([123])\.norm\.{_NORM}", r"\1.bn\2.\3"),
    (rf"{_STAGE}\.shortcut\.weight", r"\1.downsample.0.weight"),
    (rf"{_STAGE}\.shortcut\.norm\.{_NORM}", r"\1.downsample.1.\2"),
    (rf"{_STAGE}\.conv2_offset\.(weight|bias)", r"\1.conv2.conv_offset.\2"),
    # Its ancestor, maskrcnn-benchmark.
    *_TORCHVISION,
    (rf"stem\.bn1\.{_NORM}", r"bn1.\1"),
    (rf"{_BLOCK}\.conv2\.conv\.weight", r"\1.conv2.weight"),
    (rf"{_BLOCK}\.conv2\.offset\.(weight|bias)", r"\1.conv2.conv_offset.\2"),
)

# Where in the network the ResNet is; of some detectors the last stage is in the head.
_MMDETECTION_PLACES = r"(?:backbone\.|(?:roi_head\.)?shared_head\.(?=layer4\.))?"
_DETECTRON2_PLACES = (
    r"(?:backbone\.bottom_up\.|backbone\.body\.|backbone\.|bottom_up\.|roi_heads\.(?=res5\.)"
    r"|roi_heads\.box\.feature_extractor\.head\.(?=layer4\.))?"
)

# How names begin that are left out, and what they are.
_MMDETECTION_LEFT: _Rules = (
    (rf"{_MMDETECTION_PLACES}(bn1|{_BLOCK}\.(bn[123]|downsample\.1))\.{_COUNT}$", "batch counts"),
    (r"(?!(roi_head\.)?shared_head\.)\w*head\.", "heads"),
    (r"neck\.", "neck"),
    (r"fc\.(weight|bias)$", "classifier"),
    (r"ema_", "averaged weights"),
)
_DETECTRON2_LEFT: _Rules = (
    (rf"{_DETECTRON2_PLACES}(stem\.bn1|{_BLOCK}\.(bn[123]|downsample\.1))\.{_COUNT}$",
     "batch counts"),
    (rf"{_DETECTRON2_PLACES}(stem\.conv1|{_STAGE}\.(conv[123]|shortcut))\.norm\.{_COUNT}$",
     "batch counts"),
    (r"backbone\.(fpn_(lateral|output)\d\.|top_block\.|fpn\.)", "feature pyramid"),
    (r"(proposal_generator|rpn)\.", "proposal network"),
    (r"(?!roi_heads\.(res5|box\.feature_extractor\.head)\.)(roi_heads|head|sem_seg_head)\.",
     "heads"),
    (rf"{_DETECTRON2_PLACES}(linear|stem\.fc|fc)\.(weight|bias)$", "classifier"),
    (r"anchor_generator\.", "anchors"),
    (r"pixel_(mean|std)$", "image normalisation"),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """The backbone of a foreign checkpoint.

    Attributes:
        state: by the names of `ResNetFeatures`.
        left_out: what a part of the checkpoint is, and its keys there.
        backbone: ResNet-18, ResNet-34, ResNet-50 or ResNet-101.
        deform_layers: what `resnet(deform_layers=...)` must be, at the least. Layers in between
            that have no offsets in the checkpoint start with zero offsets, as plain convolutions.
        deformable: names of the layers that have offsets.
        offset_groups: G of these layers.
        modulated: whether they have masks.
    """

    state: dict[str, Tensor]
    left_out: dict[str, list[str]]
    backbone: str
    deform_layers: int
    deformable: list[str]
    offset_groups: int
    modulated: bool


def from_mmdetection(
    checkpoint: Mapping[str, Any],
    *,
    bgr: bool = False,
    pixel_mean: Sequence[float] = _MEAN,
    pixel_std: Sequence[float] = _STD,
) -> Converted:
    """The ResNet of a checkpoint of mmdetection (any version) or mmsegmentation.

    Args:
        checkpoint: as `torch.load` gives it: {"state_dict": ...}, or the state dict itself.
        bgr: whether the network saw BGR; mmdetection's configuration says to_rgb=False or
            bgr_to_rgb=False, as with style="caffe".
        pixel_mean: what was subtracted from pixels of 0 to 255, in the network's order of channels;
            must be ImageNet's, to within 1.
        pixel_std: what they were divided by, in that order; (1, 1, 1) with style="caffe".
    Raises:
        ValueError: if a key is not known, the backbone is none of our ResNets, its deformable
            layers differ in kind, or the mean is another one.
    """
    return _convert(
        checkpoint, "state_dict", _MMDETECTION_PLACES, _MMDETECTION, _MMDETECTION_LEFT,
        bgr, pixel_mean, pixel_std,
    )  # fmt: skip


def from_detectron2(
    checkpoint: Mapping[str, Any],
    *,
    bgr: bool = True,
    pixel_mean: Sequence[float] = (103.53, 116.28, 123.675),
    pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Converted:
    """The ResNet of a checkpoint of detectron2, or of its ancestor maskrcnn-benchmark.

    Args:
        checkpoint: as `torch.load` gives it: {"model": ...}, or the state dict itself.
        bgr: whether the network saw BGR (INPUT.FORMAT).
        pixel_mean: MODEL.PIXEL_MEAN, in the network's order of channels; must be ImageNet's, to
            within 1.
        pixel_std: MODEL.PIXEL_STD, in that order.
    Raises:
        ValueError: as `from_mmdetection`; also if the checkpoint itself says that its mean or
            deviation is another one.
    """
    converted = _convert(
        checkpoint, "model", _DETECTRON2_PLACES, _DETECTRON2, _DETECTRON2_LEFT,
        bgr, pixel_mean, pixel_std,
    )  # fmt: skip
    state = _state_dict(checkpoint, "model")[0]
    for name, given in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        for key in (name, f"module.{name}"):
            if key in state:
                own = torch.as_tensor(state[key]).flatten().tolist()
                if not _close(own, given, 0.01):
                    raise ValueError(
                        f"{name}: the checkpoint has {_listed(own)}, got {_listed(given)}"
                    )
    return converted


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The content of a foreign checkpoint: tensors and plain values, never code.

    Args:
        path: what `torch.save` wrote, or a safetensors file.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds Python objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    not_loaded = "which are not loaded, as they can run any code; if you trust the file,"
    if path.suffix == ".pkl":
        raise ValueError(
            f"{path}: is a pickle of Python objects, {not_loaded} save its arrays as tensors: "
            "torch.save({k: torch.as_tensor(v) for k, v in "
            'pickle.load(open(FILE, "rb"), encoding="latin1")["model"].items()}, "weights.pth")'
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ValueError(
            f"{path}: is damaged, or holds Python objects, {not_loaded} save its tensors alone: "
            'checkpoint = torch.load(FILE, map_location="cpu", weights_only=False); '
            'torch.save(checkpoint["state_dict"], "weights.pth") (of detectron2: ["model"])'
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: wanted a state dict, got {type(content).__name__}")
    return content


def _convert(
    checkpoint: Mapping[str, Any],
    wrapper: str,
    places: str,
    rules: _Rules,
    left_rules: _Rules,
    bgr: bool,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Converted:
    factors = _input_factors(bgr, pixel_mean, pixel_std)
    source, beside = _state_dict(checkpoint, wrapper)
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for key, value in source.items():
        bare = key.removeprefix("module.")
        name = _renamed(bare, places, rules)
        if name is None:
            left_out.setdefault(_reason(key, bare, left_rules), []).append(key)
            continue
        if name in state:
            raise ValueError(f"checkpoint: {origin[name]} and {key} are both {name}")
        state[name], origin[name] = torch.as_tensor(value), key
    if beside:
        left_out["beside the network"] = beside
    backbone = architecture(state)
    if backbone is None:
        raise ValueError(
            "checkpoint: wanted a whole ResNet-18, 34, 50 or 101, got blocks "
            f"{', '.join(_blocks(state)) or 'none'}"
        )
    deformable, groups, modulated = _deformable(state, origin)
    if modulated:
        for layer in deformable:
            state[f"{layer}.weight"] = state[f"{layer}.weight"] / 2
    stem = state["conv1.weight"]
    stem = stem.flip(1) if bgr else stem
    state["conv1.weight"] = stem * torch.tensor(factors, dtype=stem.dtype).view(1, 3, 1, 1)
    filters = _filters(state)
    layers = len(filters) - filters.index(deformable[0]) if deformable else 0
    return Converted(state, left_out, backbone, layers, deformable, groups, modulated)


def _state_dict(checkpoint: Mapping[str, Any], wrapper: str) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict in a checkpoint, and the keys beside it."""
    if not isinstance(checkpoint.get(wrapper), Mapping):
        return checkpoint, []
    return checkpoint[wrapper], [key for key in checkpoint if key != wrapper]


def _renamed(key: str, places: str, rules: _Rules) -> str | None:
    """Our name of a tensor of the ResNet, or None."""
    for pattern, ours in rules:
        found = re.fullmatch(f"{places}{pattern}", key)
        if found is not None:
            name = found.expand(ours)
            return re.sub(r"^res([2-5])", lambda stage: f"layer{int(stage[1]) - 1}", name)
    return None


def _reason(key: str, bare: str, rules: _Rules) -> str:
    """What a tensor is that has no place in the ResNet.

    Raises:
        ValueError: if no rule knows it.
    """
    for pattern, reason in rules:
        if re.match(pattern, bare):
            return reason
    raise ValueError(
        f"checkpoint: no rule explains {key}; is the backbone a ResNet of this code base? (A key "
        "that does not belong to the backbone can be deleted from the checkpoint.)"
    )


def _deformable(
    state: Mapping[str, Tensor], origin: Mapping[str, str]
) -> tuple[list[str], int, bool]:
    """Names of the deformable layers, their offset groups, and whether they are modulated."""
    layers = [name for name in _filters(state) if f"{name}.conv_offset.weight" in state]
    kinds: dict[tuple[int, bool], str] = {}
    for layer in layers:
        key = f"{layer}.conv_offset.weight"
        channels, inputs, *kernel = state[key].shape
        taps = kernel[0] * kernel[1]
        # Widths of ResNets and with them G are powers of two: never both 2*G and 3*G' channels.
        fitting = [
            (channels // (parts * taps), parts == 3)
            for parts in (2, 3)
            if channels % (parts * taps) == 0 and inputs % (channels // (parts * taps)) == 0
        ]
        if len(fitting) != 1:
            raise ValueError(
                f"checkpoint: {origin[key]} makes {channels} channels, neither offsets nor offsets "
                f"and masks for {inputs} channels"
            )
        kinds.setdefault(fitting[0], origin[key])
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise ValueError(f"checkpoint: {first} and {second} differ in offset groups or masks")
    groups, modulated = next(iter(kinds), (1, False))
    return layers, groups, modulated


def _filters(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the 3x3 convolutions of a ResNet, in the order of the network."""
    names = [
        key.removesuffix(".weight")
        for key, value in state.items()
        if re.fullmatch(rf"{_BLOCK}\.conv[12]\.weight", key) and value.shape[-2:] == (3, 3)
    ]
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _blocks(state: Mapping[str, Tensor]) -> list[str]:
    names = {found[1] for key in state if (found := re.match(_BLOCK, key))}
    return [
        f"{len([name for name in names if name.startswith(stage)])} in {stage[:-1]}"
        for stage in sorted({name.partition(".")[0] + "." for name in names})
    ]


def _input_factors(
    bgr: bool, pixel_mean: Sequence[float], pixel_std: Sequence[float]
) -> list[float]:
    """What the filters for R, G and B of the first convolution are multiplied by.

    Raises:
        ValueError: for another mean than ours, or a deviation that is not positive.
    """
    if len(pixel_std) != 3 or min(pixel_std) <= 0:
        raise ValueError(f"pixel_std: wanted 3 positive numbers, got {_listed(pixel_std)}")
    order = -1 if bgr else 1
    if not _close(pixel_mean, _MEAN[::order], 1):
        raise ValueError(
            f"pixel_mean: wanted {_listed(_MEAN[::order])} to within 1, got {_listed(pixel_mean)}; "
            "a convolution that pads with zeros cannot make up for another mean"
        )
    return [ours / theirs for ours, theirs in zip(_STD, pixel_std[::order], strict=True)]


def _close(values: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return len(values) == len(others) and all(
        abs(value - other) <= tolerance for value, other in zip(values, others, strict=True)
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
