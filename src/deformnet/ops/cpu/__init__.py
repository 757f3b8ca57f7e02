"""The operators on the CPU: C++ kernels behind a plain C interface."""

from deformnet.ops.cpu.deform_conv import deform_conv2d, deform_conv2d_backward
from deformnet.ops.cpu.loading import instruction_set, select_instruction_set, why_unavailable
from deformnet.ops.cpu.roi_pool import roi_pool, roi_pool_backward

__all__ = [
    "deform_conv2d",
    "deform_conv2d_backward",
    "instruction_set",
    "roi_pool",
    "roi_pool_backward",
    "select_instruction_set",
    "why_unavailable",
]
