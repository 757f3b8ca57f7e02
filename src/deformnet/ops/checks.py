"""What the operators accept.

Every entrance asks here: the public function, the fake that a compiler traces, and the kernel
itself (so that a call through `torch.ops`, too, never reads outside its tensors). Sizes may be
symbolic; nothing but `check_image_indices` looks at the values of a tensor.
"""

from typing import TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Pair: TypeAlias = tuple[int, int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BORDERS = ("zeros", "msra2017")
SAMPLINGS = ("bins", "msra", "aligned")


def pair(name: str, value: int | tuple[int, int] | list[int]) -> Pair:
    """`value` as (vertical, horizontal).

    Raises:
        TypeError: if it is neither an int nor made of ints.
        ValueError: if it is a sequence of another length than two.
    """
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: want an int or a pair of ints, got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name}: want an int or a pair of ints, got {len(value)} of them")
    for number in value:
        if not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name}: want an int or a pair of ints, got {value!r}")
    return value[0], value[1]


def deform_conv2d_shape(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
) -> tuple[int, int, int, int]:
    """The shape [N, C_out, Ho, Wo] of the output, once all arguments are found to be right.

    Raises:
        TypeError: for something that is not a tensor, or a wrong dtype.
        ValueError: for everything else; the message names the argument.
    """
    _check_tensor("input", input, 4)
    if input.dtype not in DTYPES:
        raise TypeError(f"input: want one of {_names(DTYPES)}, got {input.dtype}")
    _check_tensor("weight", weight, 4, like=input)
    _check_tensor("offset", offset, 4, like=input, or_float32=True)
    if bias is not None:
        _check_tensor("bias", bias, 1, like=input)
    if mask is not None:
        _check_tensor("mask", mask, 4, like=input, or_float32=True)

    for name, numbers, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if numbers[0] < least or numbers[1] < least:
            raise ValueError(f"{name}: want at least {least}, got {tuple(numbers)}")
    if border not in BORDERS:
        raise ValueError(f"border: want one of {', '.join(BORDERS)}, got {border!r}")

    batch, channels, height, width = input.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"input: want at least one channel, row and column, got {_shape(input)}")
    out_channels, group_channels, kh, kw = weight.shape
    if out_channels < 1 or group_channels < 1 or kh < 1 or kw < 1:
        raise ValueError(f"weight: want no size of zero, got {_shape(weight)}")
    if channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(
            f"weight: want [C_out, {channels} / groups, kh, kw], groups dividing both the "
            f"{channels} channels of input and C_out, got {_shape(weight)}"
        )
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(f"bias: want [{out_channels}], got {_shape(bias)}")

    out_height = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"input: want at least the reach of the kernel, "
            f"[{dilation[0] * (kh - 1) + 1}, {dilation[1] * (kw - 1) + 1}], "
            f"got {_shape(input)} with padding {tuple(padding)}"
        )

    taps = kh * kw
    offset_batch, offset_channels, offset_height, offset_width = offset.shape
    groups = offset_channels // (2 * taps)
    if (
        offset_batch != batch
        or offset_height != out_height
        or offset_width != out_width
        or groups < 1
        or groups * 2 * taps != offset_channels
        or channels % groups
    ):
        raise ValueError(
            f"offset: want [{batch}, {2 * taps} * G, {out_height}, {out_width}], "
            f"G dividing the {channels} channels of input, got {_shape(offset)}"
        )
    if mask is not None:
        mask_batch, mask_channels, mask_height, mask_width = mask.shape
        if (
            mask_batch != batch
            or mask_channels != groups * taps
            or mask_height != out_height
            or mask_width != out_width
        ):
            raise ValueError(
                f"mask: want [{batch}, {groups * taps}, {out_height}, {out_width}] "
                f"({groups} offset groups of {taps} taps), got {_shape(mask)}"
            )
    return batch, out_channels, out_height, out_width


def roi_pool_shape(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
) -> tuple[int, int, int, int]:
    """The shape [R, C_out, ph, pw] of the output, once all arguments are found to be right.

    Raises:
        TypeError: for something that is not a tensor, or a wrong dtype.
        ValueError: for everything else; the message names the argument.
    """
    _check_tensor("input", input, 4)
    if input.dtype not in DTYPES:
        raise TypeError(f"input: want one of {_names(DTYPES)}, got {input.dtype}")
    _check_tensor("boxes", boxes, 2)
    if boxes.shape[1] != 5:
        raise ValueError(f"boxes: want [R, 5] or a list of [r, 4], got {_shape(boxes)}")
    if boxes.dtype not in (input.dtype, torch.float32, torch.float64):
        wanted = (torch.float32, torch.float64)
        wanted = wanted if input.dtype in wanted else (input.dtype, *wanted)
        raise TypeError(f"boxes: want one of {_names(wanted)}, got {boxes.dtype}")
    if boxes.device != input.device:
        raise ValueError(f"boxes: want device {input.device}, as input, got {boxes.device}")
    if offset is not None:
        _check_tensor("offset", offset, 4, like=input, or_float32=True)

    ph, pw = output_size
    if ph < 1 or pw < 1:
        raise ValueError(f"output_size: want at least 1, got {tuple(output_size)}")
    _check_number("spatial_scale", spatial_scale)
    if not 0 < spatial_scale < float("inf"):
        raise ValueError(f"spatial_scale: want a positive number, got {spatial_scale}")
    _check_number("gamma", gamma)
    if not float("-inf") < gamma < float("inf"):
        raise ValueError(f"gamma: want a finite number, got {gamma}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling: want one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if not isinstance(samples_per_bin, (int, torch.SymInt)):
        raise TypeError(f"samples_per_bin: want an int, got {samples_per_bin!r}")
    if samples_per_bin < 0:
        raise ValueError(f"samples_per_bin: want at least 0, got {samples_per_bin}")
    if samples_per_bin == 0 and sampling != "aligned":
        raise ValueError(
            f'samples_per_bin: want at least 1 (0 adapts in "aligned" alone), '
            f"got 0 with {sampling!r}"
        )

    _, channels, height, width = input.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"input: want at least one channel, row and column, got {_shape(input)}")
    if position_sensitive:
        if channels % (ph * pw):
            raise ValueError(
                f"input: want channels in multiples of the {ph} * {pw} bins, got {_shape(input)}"
            )
        channels = channels // (ph * pw)
    count = boxes.shape[0]
    if offset is not None:
        offset_count, offset_channels, part_h, part_w = offset.shape
        groups = offset_channels // 2
        if (
            offset_count != count
            or groups < 1
            or groups * 2 != offset_channels
            or channels % groups
            or (sampling != "msra" and (part_h != ph or part_w != pw))
            or part_h < 1
            or part_w < 1
        ):
            parts = "part_h, part_w" if sampling == "msra" else f"{ph}, {pw}"
            raise ValueError(
                f"offset: want [{count}, 2 * G, {parts}], "
                f"G dividing the {channels} channels of the output, got {_shape(offset)}"
            )
    return count, channels, ph, pw


def values_known(tensor: Tensor) -> bool:
    """Whether there are numbers in a tensor, to be looked at while Python runs."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


def check_image_indices(boxes: Tensor, batch: int) -> None:
    """Refuses boxes [R, 5] of images that are not in the batch, where that costs no waiting.

    Raises:
        ValueError: if an index is not one of 0 .. batch - 1.
    """
    if boxes.device.type != "cpu" or not values_known(boxes):
        return
    image = boxes.detach()[:, 0]
    wrong = ~((image >= 0) & (image < batch) & (image == image.floor()))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"boxes: want an image's index, a whole number below {batch}, in the first column, "
            f"got {image[row].item():g} in row {row}"
        )


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: want a number, got {value!r}")


def _check_tensor(
    name: str, tensor: Tensor, rank: int, like: Tensor | None = None, or_float32: bool = False
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: want a tensor, got {type(tensor).__name__}")
    if tensor.dim() != rank:
        raise ValueError(f"{name}: want {rank} dimensions, got {_shape(tensor)}")
    if like is None:
        return
    dtype, wanted = tensor.dtype, like.dtype
    if dtype != wanted and not (
        or_float32 and dtype == torch.float32 and wanted in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(
            f"{name}: want {wanted}, as input,{' or torch.float32,' if or_float32 else ''} "
            f"got {dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name}: want device {like.device}, as input, got {tensor.device}")


def _shape(tensor: Tensor) -> str:
    # Spelled out: a compiler that traces this formats symbolic sizes, but not a list of them.
    return f"[{', '.join([f'{size}' for size in tensor.shape])}]"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
