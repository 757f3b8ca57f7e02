"""Deformable convolutional networks (Dai et al. 2017) for PyTorch."""

from deformnet.nn import (
    DeformConv2d,
    DeformPSRoIPool2d,
    DeformRoIPool2d,
    deform_,
    parameter_groups,
)

__all__ = [
    "DeformConv2d",
    "DeformPSRoIPool2d",
    "DeformRoIPool2d",
    "__version__",
    "deform_",
    "parameter_groups",
]
__version__ = "0.1.0"
