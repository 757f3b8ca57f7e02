"""The operators: what is computed. Imports PyTorch alone."""

from deformnet.ops.deform_conv import deform_conv2d

__all__ = ["deform_conv2d"]
