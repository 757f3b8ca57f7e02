"""Deformable layers that learn their own offsets, and the conversion of models to them."""

from deformnet.nn.conversion import deform_
from deformnet.nn.deform_conv import DeformConv2d
from deformnet.nn.optimization import parameter_groups
from deformnet.nn.roi_pool import DeformPSRoIPool2d, DeformRoIPool2d

__all__ = ["DeformConv2d", "DeformPSRoIPool2d", "DeformRoIPool2d", "deform_", "parameter_groups"]
