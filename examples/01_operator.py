"""
The operator in ten lines
=========================

A convolution samples its input on a regular grid. Deformable convolution adds an offset to every
tap of that grid, at every position. :func:`deformnet.ops.deform_conv2d` takes the offsets as a
tensor.
"""

# %%
# Ten lines
# ---------
# Offsets are in pixels of the input, ``(y, x)`` for each of the nine taps. Zero offsets give a
# plain convolution.

import torch
from torch.nn.functional import conv2d

from deformnet.ops import deform_conv2d

torch.manual_seed(0)
images = torch.randn(1, 3, 32, 32)
weight = torch.randn(8, 3, 3, 3)
offset = torch.zeros(1, 2 * 9, 32, 32)
output = deform_conv2d(images, offset, weight, padding=1)
print(
    output.shape,
    "equal to conv2d:",
    torch.allclose(output, conv2d(images, weight, padding=1), atol=1e-4),
)

# %%
# Special cases
# -------------
# If every tap is shifted by its own distance from the center, the kernel is dilated by 2. If all
# taps are shifted equally, they sample a shifted image. Other offsets give filters that no plain
# convolution can have.

taps = torch.stack(torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij"), dim=-1)
taps = taps.reshape(9, 2).float()  # (y, x) of each tap, relative to the center


def field(shifts: torch.Tensor) -> torch.Tensor:
    """The same offsets [9, 2] at every position of a map of 32x32: [1, 18, 32, 32]."""
    return shifts.reshape(1, 18, 1, 1).expand(1, 18, 32, 32)


dilated = deform_conv2d(images, field(taps), weight, padding=1)
print(
    "dilation 2:", torch.allclose(dilated, conv2d(images, weight, padding=2, dilation=2), atol=1e-4)
)
shifted = deform_conv2d(images, field(torch.tensor([[0.0, 5.0]]).expand(9, 2)), weight, padding=1)
print("shifted by 5:", torch.allclose(shifted[..., 2:25], output[..., 7:30], atol=1e-4))

# %%
# Sampled pixels
# --------------
# The gradient of an output with respect to the input is nonzero at the pixels that contribute to
# it: for each tap, the four pixels of its bilinear interpolation.

import matplotlib.pyplot as plt

angle = torch.tensor(30.0).deg2rad()
rotation = torch.stack(
    [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
)
kinds = {
    "zero": torch.zeros(9, 2),
    "dilated by 2": taps,
    "shifted by (0, 5)": torch.tensor([[0.0, 5.0]]).expand(9, 2),
    "scaled and rotated": 3 * taps @ rotation.T - taps,
    "random": 2.5 * torch.randn(9, 2),
}
figure, axes = plt.subplots(1, len(kinds), figsize=(11, 2.6), layout="constrained")
for ax, (name, shifts) in zip(axes, kinds.items(), strict=True):
    image = torch.zeros(1, 1, 32, 32, requires_grad=True)
    output = deform_conv2d(image, field(shifts), torch.ones(1, 1, 3, 3), padding=1)
    (weights,) = torch.autograd.grad(output[0, 0, 16, 16], image)
    ax.imshow(weights[0, 0].numpy(), cmap="Greys", vmin=0, vmax=1)
    y, x = (16 + taps + shifts).T.numpy()
    ax.scatter(x, y, s=14, color="#d55e00", zorder=2)
    ax.plot(16, 16, marker="P", color="#56b4e9", markersize=9, markeredgecolor="black")
    ax.set(title=name, xlim=(8.5, 23.5), ylim=(23.5, 8.5), xticks=[], yticks=[])
plt.show()

# %%
# The blue cross is the position of the output, the orange dots are its taps, and gray shows the
# weight of each pixel.
#
# The operator is differentiable with respect to the offsets, so a network can learn them:
# :class:`deformnet.nn.DeformConv2d` computes its offsets with its own convolution. See
# :doc:`/operators` for the rules at the border of the map.
