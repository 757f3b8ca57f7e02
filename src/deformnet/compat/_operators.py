"""The operator with the conventions of other libraries."""

from torch import Tensor

from deformnet.ops import deform_conv2d
from deformnet.ops._arguments import IntOrPair


def grouped_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair,
    dilation: IntOrPair,
    mask: Tensor | None,
    groups: int,
    offset_groups: int,
) -> Tensor:
    """`deform_conv2d` for callers that also pass the numbers of groups, which the shapes determine.

    Raises:
        ValueError: If the numbers of groups do not match the shapes; see also `deform_conv2d`.
    """
    output = deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    # Only after the call, which checks the shapes.
    _, group_channels, height, width = weight.shape
    for name, value, found in (
        ("groups", groups, input.shape[1] // group_channels),
        ("offset groups", offset_groups, offset.shape[1] // (2 * height * width)),
    ):
        if value != found:
            raise ValueError(
                f"expected {name} to be {found}, as in the shapes of weight "
                f"{list(weight.shape)} and offset {list(offset.shape)}, but got {value}"
            )
    return output
