"""Argument checks of RoI pooling."""

from collections.abc import Sequence
from sys import float_info
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from deformnet.ops._arguments import (
    MOST,
    Pair,
    check_input,
    check_most,
    check_pair,
    check_tensor,
    dtype_names,
    shape_text,
    with_values,
)

Sampling: TypeAlias = Literal["bins", "msra", "aligned"]
SAMPLINGS = get_args(Sampling)

# GPU kernels and the reference read each sample of a bin; there are `samples_per_bin` squared.
MOST_SAMPLES = 1024


class Rule(NamedTuple):
    """The arguments that are not tensors."""

    output_size: Pair
    spatial_scale: float
    gamma: float
    sampling: str
    samples_per_bin: int
    position_sensitive: bool

    def out_channels(self, input: Tensor) -> int:
        """The channels of the output."""
        ph, pw = self.output_size
        return input.shape[1] // (ph * pw) if self.position_sensitive else input.shape[1]


def check(
    input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule
) -> tuple[int, int, int, int]:
    """Check all arguments of a pooling operator except the values of `boxes`.

    Returns:
        The shape [R, C, ph, pw] of the output.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if anything else is wrong; the message names the argument.
    """
    _, channels, _, _ = check_input(input)
    _check_boxes(boxes, input)
    if offset is not None:
        check_tensor("offset", offset, 4, input, True)
    _check_rule(rule)
    ph, pw = rule.output_size
    if rule.position_sensitive and channels % (ph * pw):
        raise ValueError(
            f"expected input to have channels in multiples of the {ph} * {pw} bins, "
            f"but got shape {shape_text(input)}"
        )
    channels, count = rule.out_channels(input), boxes.shape[0]
    if offset is not None:
        offset_count, offset_channels, part_h, part_w = offset.shape
        groups = offset_channels // 2
        if (
            offset_count != count
            or groups < 1
            or groups * 2 != offset_channels
            or channels % groups
            or (rule.sampling != "msra" and (part_h != ph or part_w != pw))
            or part_h < 1
            or part_w < 1
        ):
            parts = "part_h, part_w" if rule.sampling == "msra" else f"{ph}, {pw}"
            raise ValueError(
                f"expected offset to have shape [{count}, 2 * G, {parts}], where G divides the "
                f"{channels} channels of the output, but got shape {shape_text(offset)}"
            )
    return count, channels, ph, pw


def _check_boxes(boxes: Tensor, input: Tensor) -> None:
    check_tensor("boxes", boxes, 2)
    if boxes.shape[1] != 5:
        raise ValueError(
            "expected boxes to have shape [R, 5] or to be a list of [r, 4], "
            f"but got shape {shape_text(boxes)}"
        )
    if boxes.dtype not in (input.dtype, torch.float32, torch.float64):
        accepted = (torch.float32, torch.float64)
        accepted = accepted if input.dtype in accepted else (input.dtype, *accepted)
        raise TypeError(
            f"expected boxes to be one of {dtype_names(accepted)}, but got {boxes.dtype}"
        )
    if boxes.device != input.device:
        raise ValueError(
            f"expected boxes to be on {input.device} like input, but got {boxes.device}"
        )


def _check_rule(rule: Rule) -> None:
    check_pair("output_size", rule.output_size)
    (ph, pw), spatial_scale, gamma, sampling, samples_per_bin, _ = rule
    if ph < 1 or pw < 1:
        raise ValueError(f"expected output_size to be at least 1, but got ({ph}, {pw})")
    check_most("output_size", "bins", ph * pw, MOST, ph, pw)
    # Neither infinite nor an int that is too large for a float.
    if not 0 < spatial_scale <= float_info.max:
        raise ValueError(f"expected spatial_scale to be positive, but got {spatial_scale}")
    if not -float_info.max <= gamma <= float_info.max:
        raise ValueError(f"expected gamma to be finite, but got {gamma}")
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"expected sampling to be one of {', '.join(SAMPLINGS)}, but got {sampling!r}"
        )
    if samples_per_bin < 0:
        raise ValueError(f"expected samples_per_bin to be at least 0, but got {samples_per_bin}")
    if samples_per_bin > MOST_SAMPLES:
        raise ValueError(
            f"expected samples_per_bin to be at most {MOST_SAMPLES}, but got {samples_per_bin}"
        )
    if samples_per_bin == 0 and sampling != "aligned":
        raise ValueError(
            'expected samples_per_bin to be at least 1 (only "aligned" adapts with 0), '
            f"but got 0 with {sampling!r}"
        )


def check_image_indices(input: Tensor, boxes: Tensor, offset: Tensor | None = None) -> None:
    """Check that boxes [R, 5] belong to images of the batch, if this needs no synchronization.

    Raises:
        ValueError: if an index is not one of 0, ..., N - 1.
    """
    known = with_values(boxes) if boxes.is_cpu else None
    if known is None:
        return
    batch, images = input.shape[0], known[:, 0].tolist()
    wrong = {image for image in set(images) if not 0 <= image < batch or image != int(image)}
    if wrong:
        row = next(row for row, image in enumerate(images) if image in wrong)
        raise ValueError(
            f"expected the first column of boxes to be the index of an image, an integer "
            f"from 0 to {batch - 1}, but got {images[row]:g} in row {row}"
        )


def join_boxes(boxes: Tensor | Sequence[Tensor], input: Tensor) -> Tensor:
    """Convert a list with the boxes [r, 4] of each image to one tensor [R, 5].

    Raises:
        TypeError: if it is neither a tensor nor a list of tensors.
        ValueError: if it is a list of more tensors than images, or of tensors that do not match.
    """
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(
            f"expected boxes to be a tensor or a list of tensors, but got {type(boxes).__name__}"
        )
    if isinstance(input, Tensor) and input.dim() == 4 and len(boxes) > input.shape[0]:
        raise ValueError(
            f"expected boxes to have at most one tensor for each of the {input.shape[0]} images, "
            f"but got {len(boxes)}"
        )
    rows = []
    for image, some in enumerate(boxes):
        if not isinstance(some, Tensor):
            raise TypeError(
                f"expected boxes[{image}] to be a tensor, but got {type(some).__name__}"
            )
        if some.dim() != 2 or some.shape[1] != 4:
            raise ValueError(
                f"expected boxes[{image}] to have shape [r, 4], but got shape {list(some.shape)}"
            )
        if some.dtype != boxes[0].dtype or some.device != boxes[0].device:
            raise ValueError(
                f"expected boxes[{image}] to be {boxes[0].dtype} on {boxes[0].device} like "
                f"boxes[0], but got {some.dtype} on {some.device}"
            )
        if some.dtype in (torch.bfloat16, torch.float16):
            some = some.float()  # which can count the images of any batch
        rows.append(torch.cat([some.new_full((some.shape[0], 1), image), some], dim=1))
    return torch.cat(rows) if rows else input.new_zeros(0, 5)
