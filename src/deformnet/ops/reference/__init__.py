"""The definition of every operator, in plain differentiable PyTorch, for any device.

A fast kernel is right when it agrees with what stands here.
"""

from deformnet.ops.reference.deform_conv import deform_conv2d
from deformnet.ops.reference.roi_pool import roi_pool

__all__ = ["deform_conv2d", "roi_pool"]
