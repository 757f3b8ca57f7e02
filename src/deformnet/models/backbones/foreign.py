"""Conversion of mmdetection's and detectron2's checkpoints to torchvision's ResNet.

The ResNets of both are torchvision's with other key names. All other differences are folded into
the weights, so that the features are equal:

- Mask of modulated deformable layers: theirs is sigmoid(.), ours 2*sigmoid(.), so the layer's
  weights are halved.
- Input normalization: theirs may be BGR pixels from 0 to 255 minus the mean; ours is RGB, also
  divided by the standard deviation.

Keys and shapes do not tell where the blocks stride: load weights of mmdetection's style="caffe" and
of detectron2's STRIDE_IN_1X1 (its default) into `backbone(..., stride_in_1x1=True)`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet.models import _tensors
from deformnet.models.backbones.weights import architecture

# Mean and standard deviation of our input normalization, RGB pixels from 0 to 255.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)

_Rules = tuple[tuple[str, str], ...]

_NORM = r"(weight|bias|running_mean|running_var)"
_COUNT = r"num_batches_tracked"
_BLOCK = r"(layer[1-4]\.\d+)"
# Patterns of ResNet keys and their replacements.
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
    (rf"{_BLOCK}\.conv([12])\.conv_offset(?:_mask)?\.(weight|bias)", r"\1.conv\2.conv_offset.\3"),
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
    # Its predecessor, maskrcnn-benchmark.
    *_TORCHVISION,
    (rf"stem\.bn1\.{_NORM}", r"bn1.\1"),
    (rf"{_BLOCK}\.conv2\.conv\.weight", r"\1.conv2.weight"),
    (rf"{_BLOCK}\.conv2\.offset\.(weight|bias)", r"\1.conv2.conv_offset.\2"),
)

# torchvision's keys of the weights of convolutions, including those that predict offsets.
_FILTERS = re.compile(rf"conv1\.weight|{_BLOCK}\.(conv[123](\.conv_offset)?|downsample\.0)\.weight")

# Prefixes that distributed and compiled models add to all keys.
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")

# Prefixes of the ResNet; some detectors have the last stage in their head.
_MMDETECTION_PREFIX = r"(?:backbone\.|(?:roi_head\.)?shared_head\.(?=layer4\.))?"
_DETECTRON2_PREFIX = (
    r"(?:backbone\.bottom_up\.|backbone\.body\.|backbone\.|bottom_up\.|roi_heads\.(?=res5\.)"
    r"|roi_heads\.box\.feature_extractor\.head\.(?=layer4\.))?"
)

# Patterns of ignored keys, and what they belong to.
_MMDETECTION_IGNORED: _Rules = (
    (rf"{_MMDETECTION_PREFIX}(bn1|{_BLOCK}\.(bn[123]|downsample\.1))\.{_COUNT}$", "batch counts"),
    (r"(?!(roi_head\.)?shared_head\.)\w*head\.", "heads"),
    (r"neck\.", "neck"),
    (r"fc\.(weight|bias)$", "classifier"),
    (r"ema_", "averaged weights"),
    (r"data_preprocessor\.(mean|std)$", "image normalization"),
)
_DETECTRON2_IGNORED: _Rules = (
    (rf"{_DETECTRON2_PREFIX}(stem\.bn1|{_BLOCK}\.(bn[123]|downsample\.1))\.{_COUNT}$",
     "batch counts"),
    (rf"{_DETECTRON2_PREFIX}(stem\.conv1|{_STAGE}\.(conv[123]|shortcut))\.norm\.{_COUNT}$",
     "batch counts"),
    (r"backbone\.(fpn_(lateral|output)\d\.|top_block\.|fpn\.)", "feature pyramid"),
    (r"(proposal_generator|rpn)\.", "proposal network"),
    (r"(?!roi_heads\.(res5|box\.feature_extractor\.head)\.)(roi_heads|head|sem_seg_head)\.",
     "heads"),
    (rf"{_DETECTRON2_PREFIX}(linear|stem\.fc|fc)\.(weight|bias)$", "classifier"),
    (r"anchor_generator\.", "anchors"),
    (r"pixel_(mean|std)$", "image normalization"),
)  # fmt: skip


class _Format(NamedTuple):
    """Keys in a code base's checkpoints: that of the state dict, patterns of its keys, and the keys
    of the image mean and standard deviation."""

    wrapper: str
    prefix: str
    rules: _Rules
    ignored: _Rules
    normalization: tuple[str, str]


_MMDETECTION_FORMAT = _Format(
    "state_dict",
    _MMDETECTION_PREFIX,
    _MMDETECTION,
    _MMDETECTION_IGNORED,
    ("data_preprocessor.mean", "data_preprocessor.std"),
)
_DETECTRON2_FORMAT = _Format(
    "model", _DETECTRON2_PREFIX, _DETECTRON2, _DETECTRON2_IGNORED, ("pixel_mean", "pixel_std")
)


@dataclass(frozen=True)
class Converted:
    """A converted backbone.

    Attributes:
        state: State dict for `ResNetFeatures`.
        ignored: Ignored keys of the checkpoint, by what they belong to.
        backbone: "ResNet-18", "ResNet-34", "ResNet-50" or "ResNet-101".
        deform_layers: Minimum `deform_layers` of `backbone`. Layers among these without offsets in
            the checkpoint start with zero offsets, equal to plain convolutions.
        deformable: Names of the layers with offsets.
        offset_groups: Offset groups of these layers.
        modulated: Whether these layers have masks.
    """

    state: dict[str, Tensor]
    ignored: dict[str, list[str]]
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
    """Convert the ResNet of a checkpoint of mmdetection (any version) or mmsegmentation.

    Args:
        checkpoint: Output of `torch.load`: {"state_dict": ...}, or the state dict itself.
        bgr: Whether the input is BGR: to_rgb=False or bgr_to_rgb=False in the configuration, as
            with style="caffe".
        pixel_mean: Mean that is subtracted from pixels of 0 to 255, in the network's channel order;
            ImageNet's to within 1.
        pixel_std: Standard deviation, in the same order; (1, 1, 1) with style="caffe".

    Raises:
        UserError: If a key is unknown, the backbone is not a supported ResNet, its deformable
            layers differ in offset groups or masks, the mean is not ImageNet's, or the checkpoint
            contains another mean or standard deviation.
    """
    return _convert(checkpoint, _MMDETECTION_FORMAT, bgr, pixel_mean, pixel_std)


def from_detectron2(
    checkpoint: Mapping[str, Any],
    *,
    bgr: bool = True,
    pixel_mean: Sequence[float] = (103.53, 116.28, 123.675),
    pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Converted:
    """Convert the ResNet of a checkpoint of detectron2, or of its predecessor maskrcnn-benchmark.

    Args:
        checkpoint: Output of `torch.load`: {"model": ...}, or the state dict itself.
        bgr: Whether the input is BGR (INPUT.FORMAT).
        pixel_mean: MODEL.PIXEL_MEAN, in the network's channel order; ImageNet's to within 1.
        pixel_std: MODEL.PIXEL_STD, in the same order.

    Raises:
        UserError: See `from_mmdetection`.
    """
    return _convert(checkpoint, _DETECTRON2_FORMAT, bgr, pixel_mean, pixel_std)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint of tensors and plain values, without running code.

    Args:
        path: Checkpoint of `torch.save`, or safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is damaged, or contains Python objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _tensors.read_safetensors(path)[0]
    not_loaded = "which are not loaded because they can run any code; if you trust the file,"
    if path.suffix == ".pkl":
        raise UserError(
            f"{path}: a pickle of Python objects, {not_loaded} save its arrays as tensors: "
            "torch.save({k: torch.as_tensor(v) for k, v in "
            'pickle.load(open(FILE, "rb"), encoding="latin1")["model"].items()}, "weights.pth")'
        )
    try:
        content = _tensors.read_torch(path, legacy=True)
    except UserError as error:
        raise UserError(
            f"{path}: damaged, or contains Python objects ({error}), {not_loaded} save only its "
            'tensors: checkpoint = torch.load(FILE, map_location="cpu", weights_only=False); '
            'torch.save(checkpoint["state_dict"], "weights.pth") (of detectron2: ["model"])'
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a state dict, but got {type(content).__name__}")
    return content


def _convert(
    checkpoint: Mapping[str, Any],
    format: _Format,
    bgr: bool,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Converted:
    factors = _input_factors(bgr, pixel_mean, pixel_std)
    source, beside = _state_dict(checkpoint, format.wrapper)
    _require_normalization(source, format.normalization, pixel_mean, pixel_std)
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    ignored: dict[str, list[str]] = {}
    for key, value in source.items():
        if not isinstance(key, str):
            raise UserError(f"checkpoint: expected strings as keys, but got {key!r:.40}")
        bare = _PREFIXES.sub("", key)
        name = _renamed(bare, format)
        if name is None:
            ignored.setdefault(_reason(key, bare, format.ignored), []).append(key)
            continue
        if name in state:
            raise UserError(f"checkpoint: keys {origin[name]} and {key} both map to {name}")
        state[name], origin[name] = _tensor(key, value), key
        if _FILTERS.fullmatch(name):
            _require_filters(key, state[name], 3 if name == "conv1.weight" else None)
    if beside:
        ignored["training state"] = beside
    backbone = architecture(state)
    if backbone is None:
        raise UserError(
            "checkpoint: expected a complete ResNet-18, 34, 50 or 101, "
            f"but got {', '.join(_blocks(state)) or 'no blocks'}"
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
    return Converted(state, ignored, backbone, layers, deformable, groups, modulated)


def _require_normalization(
    state: Mapping[str, Any],
    names: tuple[str, str],
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> None:
    """Raises UserError if the checkpoint contains another mean or standard deviation."""
    given = {names[0]: ("pixel_mean", pixel_mean), names[1]: ("pixel_std", pixel_std)}
    for key, value in state.items():
        if not isinstance(key, str) or (bare := _PREFIXES.sub("", key)) not in given:
            continue
        name, numbers = given[bare]
        own = _tensor(key, value).flatten().tolist()
        if not _close(own, numbers, 0.01):
            raise UserError(
                f"expected {name} to be that of the checkpoint, {_listed(own)}, "
                f"but got {_listed(numbers)}"
            )


def _tensor(key: str, value: object) -> Tensor:
    """The value of a key in a checkpoint, as a tensor."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = type(value).__name__
        raise UserError(f"checkpoint: expected {key} to be a tensor, but got {kind}") from None
    if (problem := _tensors.flaw(tensor)) is not None:
        raise UserError(f"checkpoint: expected {key} to be {problem}")
    return tensor


def _require_filters(key: str, tensor: Tensor, channels: int | None = None) -> None:
    if (
        tensor.ndim != 4
        or not tensor.numel()
        or not tensor.is_floating_point()
        or (channels is not None and tensor.shape[1] != channels)
    ):
        raise UserError(
            f"checkpoint: expected {key} to be the 4-D weight of a convolution"
            + (f" of {channels} channels" if channels is not None else "")
            + f", but got {list(tensor.shape)} of {tensor.dtype}"
        )


def _state_dict(checkpoint: Mapping[str, Any], wrapper: str) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict in a checkpoint, and all other keys of the checkpoint."""
    if not isinstance(checkpoint.get(wrapper), Mapping):
        return checkpoint, []
    return checkpoint[wrapper], [key for key in checkpoint if key != wrapper]


def _renamed(key: str, format: _Format) -> str | None:
    """torchvision's name of a ResNet key; None for other keys."""
    for pattern, replacement in format.rules:
        match = re.fullmatch(f"{format.prefix}{pattern}", key)
        if match is not None:
            name = match.expand(replacement)
            return re.sub(r"^res([2-5])", lambda stage: f"layer{int(stage[1]) - 1}", name)
    return None


def _reason(key: str, bare: str, rules: _Rules) -> str:
    """What a key outside the ResNet belongs to; UserError if no rule says so."""
    for pattern, reason in rules:
        if re.match(pattern, bare):
            return reason
    raise UserError(
        f"checkpoint: unexpected key {key}; is the backbone a ResNet of this code base? (Delete "
        "keys that do not belong to the backbone from the checkpoint.)"
    )


def _deformable(
    state: Mapping[str, Tensor], origin: Mapping[str, str]
) -> tuple[list[str], int, bool]:
    """Names of the deformable layers, their offset groups and whether they are modulated."""
    layers = [name for name in _filters(state) if f"{name}.conv_offset.weight" in state]
    kinds: dict[tuple[int, bool], str] = {}
    for layer in layers:
        key = f"{layer}.conv_offset.weight"
        channels, inputs, *kernel = state[key].shape
        taps = kernel[0] * kernel[1]
        # Channels of ResNets, and so G, are powers of two: 2*G and 3*G' are never equal.
        fitting = [
            (channels // (parts * taps), parts == 3)
            for parts in (2, 3)
            if channels % (parts * taps) == 0 and inputs % (channels // (parts * taps)) == 0
        ]
        if len(fitting) != 1:
            raise UserError(
                f"checkpoint: expected {origin[key]} to output 2*G*{taps} or 3*G*{taps} channels, "
                f"G dividing the {inputs} input channels, but got {channels}"
            )
        kinds.setdefault(fitting[0], origin[key])
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise UserError(f"checkpoint: {first} and {second} differ in offset groups or masks")
    groups, modulated = next(iter(kinds), (1, False))
    return layers, groups, modulated


def _filters(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the 3x3 convolutions of a ResNet, from input to output."""
    names = [
        key.removesuffix(".weight")
        for key, value in state.items()
        if re.fullmatch(rf"{_BLOCK}\.conv[12]\.weight", key) and value.shape[-2:] == (3, 3)
    ]
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _blocks(state: Mapping[str, Tensor]) -> list[str]:
    names = {match[1] for key in state if (match := re.match(_BLOCK, key))}
    counts = Counter(name.partition(".")[0] for name in sorted(names))
    return [f"{count} blocks in {stage}" for stage, count in counts.items()]


def _input_factors(
    bgr: bool, pixel_mean: Sequence[float], pixel_std: Sequence[float]
) -> list[float]:
    """Factors on the R, G and B channels of the first convolution's weights."""
    if len(pixel_std) != 3 or min(pixel_std) <= 0:
        raise UserError(
            f"expected pixel_std to be 3 positive numbers, but got {_listed(pixel_std)}"
        )
    order = -1 if bgr else 1
    if not _close(pixel_mean, _MEAN[::order], 1):
        raise UserError(
            f"expected pixel_mean to be {_listed(_MEAN[::order])} to within 1, "
            f"but got {_listed(pixel_mean)}; another mean cannot be folded into a zero-padded "
            "convolution"
        )
    return [ours / theirs for ours, theirs in zip(_STD, pixel_std[::order], strict=True)]


def _close(values: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return len(values) == len(others) and all(
        abs(value - other) <= tolerance for value, other in zip(values, others, strict=True)
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
