"""
Move from torchvision or mmcv
=============================

The operator takes torchvision's arguments in the same order, the layer has mmcv's state-dict
keys, and checkpoints of mmdetection and detectron2 can be converted. This page shows the
differences.
"""

# %%
# torchvision's operator
# ----------------------
# Only the import changes. Outputs and gradients are equal up to rounding.

import torch
import torchvision.ops
from torch import Tensor, nn

from deformnet import DeformConv2d
from deformnet.ops import deform_conv2d

torch.manual_seed(0)
x = torch.randn(2, 16, 20, 20, dtype=torch.float64)
weight = torch.randn(8, 16, 3, 3, dtype=torch.float64)
bias = torch.randn(8, dtype=torch.float64)
offset = 3 * torch.randn(2, 2 * 4 * 9, 20, 20, dtype=torch.float64)  # four offset groups
mask = torch.rand(2, 4 * 9, 20, 20, dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> str:
    return f"maximum difference {(a - b).abs().max():.1e}"


theirs = torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=(1, 1), mask=mask)
ours = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
print(difference(ours, theirs))

# %%
# torchvision's layer
# -------------------
# ``torchvision.ops.DeformConv2d`` expects offsets as an argument. Ours computes them with its child
# ``conv_offset``. To port a network that has both, load both sets of weights into our layer.


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(16, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offsets(x))


old, new = Theirs().double(), DeformConv2d(16, 8, 3, padding=1).double()
moved = {"conv_offset." + key: value for key, value in old.offsets.state_dict().items()}
new.load_state_dict({**old.conv.state_dict(), **moved})
print(difference(new(x), old(x)))

# %%
# Without offsets, RoI pooling with ``sampling="aligned"`` is torchvision's
# ``roi_align(aligned=True)``.

from deformnet.ops import deform_roi_pool

boxes = torch.tensor([[0, 10.0, 20, 200, 290], [1, 33.3, 40, 120.5, 90]], dtype=torch.float64)
theirs = torchvision.ops.roi_align(x, boxes, 7, 1 / 16, sampling_ratio=2, aligned=True)
ours = deform_roi_pool(x, boxes, None, 7, 1 / 16, sampling="aligned", samples_per_bin=2)
print(difference(ours, theirs))

# %%
# mmcv's layers
# -------------
# ``DeformConv2dPack`` and ``ModulatedDeformConv2dPack`` have the same state-dict keys as our
# layer, so their weights load directly. mmcv's mask is a sigmoid, ours is twice a sigmoid so that
# a new layer starts as a plain convolution; halving the weight compensates. To run without mmcv,
# this example implements mmcv's modulated layer with torchvision's operator.


class ModulatedDeformConv2dPack(nn.Conv2d):
    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, padding: int, bias: bool
    ) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=padding, bias=bias)
        self.conv_offset = nn.Conv2d(inputs, 3 * kernel_size**2, kernel_size, padding=padding)

    def forward(self, input: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(input).chunk(3, dim=1)
        offset = torch.cat((first, second), dim=1)
        return torchvision.ops.deform_conv2d(
            input, offset, self.weight, self.bias, padding=(1, 1), mask=mask.sigmoid()
        )


old = ModulatedDeformConv2dPack(16, 8, 3, padding=1, bias=True).double()
new = DeformConv2d(16, 8, 3, padding=1, modulated=True).double()
state = old.state_dict()
new.load_state_dict({**state, "weight": state["weight"] / 2})
print(*state, sep="\n")
print(difference(new(x), old(x)))

# %%
# Checkpoints of mmdetection
# --------------------------
# :func:`deformnet.models.backbones.foreign.from_mmdetection` (and ``from_detectron2``) extracts
# the ResNet from a checkpoint: it renames the keys, halves the weights of modulated layers, and
# reports the keys that it skipped. Unexpected keys are an error. On the command line, use
# ``deformnet weights import``; see :doc:`/weights`. Here the network is torchvision's ResNet-18
# with two modulated layers, and the checkpoint uses mmdetection's key names; a real one comes from
# ``torch.load(path, weights_only=True)``.

from deformnet.models.backbones.foreign import from_mmdetection

old = torchvision.models.resnet18().eval()
for name in ("conv1", "conv2"):
    layer = ModulatedDeformConv2dPack(512, 512, 3, padding=1, bias=False)
    nn.init.normal_(layer.conv_offset.weight, std=0.01)
    setattr(old.layer4[1], name, layer)
checkpoint = {
    f"backbone.{key}": value for key, value in old.state_dict().items() if not key.startswith("fc.")
}
checkpoint["bbox_head.fc_cls.weight"] = torch.zeros(21, 512)

converted = from_mmdetection({"state_dict": checkpoint})
print(
    converted.backbone,
    "with",
    converted.deform_layers,
    "deformable layers, modulated:",
    converted.modulated,
)
for what, keys in converted.ignored.items():
    print(f"ignored, {what}: {len(keys)} keys, such as {keys[0]}")

# %%
# The converted weights load into our backbone, or can be saved for ``--init``. The features are
# equal up to rounding.

from deformnet.models.backbones import backbone

new = backbone(
    "resnet18", deform_layers=2, modulated=True, output_stride=32, reduce_channels=None
).eval()
new.load_state_dict(converted.state, strict=False)  # num_batches_tracked is not converted
features: list[Tensor] = []


def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    features.append(output)


old.layer4.register_forward_hook(keep)
images = torch.randn(1, 3, 128, 128)
with torch.no_grad():
    old(images)
    _, ours = new.stages(images)
print(difference(ours, features[0]), f"for features up to {ours.abs().max():.1f}")

import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(4, 3.6), layout="constrained")
ax.plot(features[0].flatten(), ours.flatten(), ".", color="#0072b2", markersize=3)
ax.set(xlabel="mmdetection's layer", ylabel="converted", title="features of an image")
plt.show()
