"""Registration of RoI pooling with PyTorch: one operator, plain or position-sensitive."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deformnet.ops._arguments import values_known
from deformnet.ops.registration import Kernels, Operator
from deformnet.ops.roi_pool import cpu, reference, standard
from deformnet.ops.roi_pool.checks import Rule, check, check_image_indices

_READ = 4  # multiply-adds of a bilinear read, one for each pixel


def _flops(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> int:
    return 2 * _READ * rule.out_channels(input) * _samples(boxes, rule)


def _backward_flops(
    input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule, needs: Sequence[bool]
) -> int:
    return sum(needs) * _flops(input, boxes, offset, rule)


def _samples(boxes: Tensor, rule: Rule) -> int:
    """The number of samples of all bins of all boxes."""
    ph, pw = rule.output_size
    if rule.sampling != "bins" and rule.samples_per_bin > 0:
        return len(boxes) * ph * pw * rule.samples_per_bin**2
    if not values_known(boxes):
        raise ValueError(
            f"expected boxes to have values, as {rule.sampling!r} sampling reads more samples in "
            "larger boxes, but got a tensor without data"
        )
    y_axis, x_axis = reference.axes(boxes, boxes[:, 0] >= 0, rule)
    return int((y_axis.number.sum(1) * x_axis.number.sum(1)).sum())


def _fold(
    input: Tensor, boxes: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    check_image_indices(input[0], boxes.flatten(0, 1))
    samples, images = input.shape[:2]
    if boxes.dtype in (torch.bfloat16, torch.float16):
        boxes = boxes.float()  # half precision cannot index the images of all samples
    image = boxes[..., :1]
    first = torch.arange(samples, dtype=boxes.dtype, device=boxes.device) * images
    # An image index that is out of range in its own sample must not select another sample's image.
    own = (image >= 0) & (image < images)
    image = torch.where(own, image + first[:, None, None], -1)
    boxes = torch.cat([image, boxes[..., 1:]], dim=2).flatten(0, 1)
    return input.flatten(0, 1), boxes, None if offset is None else offset.flatten(0, 1)


def _triton() -> Kernels:
    from deformnet.ops.roi_pool import triton

    return Kernels(triton.roi_pool, triton.roi_pool_backward)


OPERATOR = Operator(
    "roi_pool",
    "Tensor input, Tensor boxes, Tensor? offset, int[2] output_size, float spatial_scale, "
    "float gamma, str sampling, int samples_per_bin, bool position_sensitive",
    Rule,
    check=check,
    check_values=check_image_indices,
    differentiable=("input", "offset"),
    positions=("boxes", "offset"),
    rows=("input", "boxes", "offset"),
    fold=_fold,
    keeps_memory_format=False,
    reference=reference.roi_pool,
    standard=standard.roi_pool,
    onnx=standard.roi_pool,
    cpu=Kernels(cpu.roi_pool, cpu.roi_pool_backward, cpu.plan),
    triton=_triton,
    flops=_flops,
    backward_flops=_backward_flops,
)
