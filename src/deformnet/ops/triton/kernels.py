"""The operators, under the names that `deformnet.ops.cpu` has them under."""

from deformnet.ops.triton.deform_conv import deform_conv2d, deform_conv2d_backward
from deformnet.ops.triton.roi_pooling import roi_pool, roi_pool_backward

__all__ = ["deform_conv2d", "deform_conv2d_backward", "roi_pool", "roi_pool_backward"]
