"""Operators as functions. Requires only PyTorch."""

from deformnet.ops.backends import using
from deformnet.ops.deform_conv.api import deform_conv2d
from deformnet.ops.registration import decompositions
from deformnet.ops.roi_pool.api import deform_ps_roi_pool, deform_roi_pool

__all__ = ["decompositions", "deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool", "using"]
