"""Drop-in replacements for the deformable operators of other libraries. Requires only PyTorch.

`accelerate_torchvision` replaces torchvision's operator wherever it is called. The modules `mmcv`
and `dcn_v2` provide the names and conventions of `mmcv.ops` and DCNv2: replace
`from mmcv.ops import ModulatedDeformConv2dPack` with
`from deformnet.compat.mmcv import ModulatedDeformConv2dPack`.
"""

from deformnet.compat import dcn_v2, mmcv
from deformnet.compat.acceleration import TorchvisionAcceleration, accelerate_torchvision

__all__ = ["TorchvisionAcceleration", "accelerate_torchvision", "dcn_v2", "mmcv"]
