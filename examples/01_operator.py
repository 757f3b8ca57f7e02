"""
The operator in ten lines
=========================

A convolution reads its input on a grid. A deformable convolution adds an offset to every tap of
that grid, at every position: :func:`deformnet.ops.deform_conv2d` takes them as a tensor, wherever
they come from.
"""

# %%
# The ten lines
# -------------
# Offsets count in pixels of the input, ``(y, x)`` for each of the nine taps. Zeros give a plain
# convolution.

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
# Offsets that make a convolution another one
# -------------------------------------------
# If every tap moves by its own distance from the middle, the kernel is dilated by 2. Shifted taps
# read a shifted image. Anything in between is a filter that no plain convolution has.

taps = torch.stack(torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij"), dim=-1)
taps = taps.reshape(9, 2).float()  # (y, x) of each tap, from the middle


def field(moves: torch.Tensor) -> torch.Tensor:
    """The same moves [9, 2] at every position of a map of 32x32: [1, 18, 32, 32]."""
    return moves.reshape(1, 18, 1, 1).expand(1, 18, 32, 32)


dilated = deform_conv2d(images, field(taps), weight, padding=1)
print(
    "dilation 2:", torch.allclose(dilated, conv2d(images, weight, padding=2, dilation=2), atol=1e-4)
)
shifted = deform_conv2d(images, field(torch.tensor([[0.0, 5.0]]).expand(9, 2)), weight, padding=1)
print("shifted by 5:", torch.allclose(shifted[..., 2:25], output[..., 7:30], atol=1e-4))

# %%
# What is read
# ------------
# The gradient of one output by the input is not zero exactly where that output reads. So it shows
# the taps, and between pixels the four cells that the bilinear read mixes.

import matplotlib.pyplot as plt

turn = torch.tensor(30.0).deg2rad()
rotation = torch.stack(
    [torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])]
)
kinds = {
    "zero": torch.zeros(9, 2),
    "dilated by 2": taps,
    "shifted by (0, 5)": torch.tensor([[0.0, 5.0]]).expand(9, 2),
    "larger and turned": 3 * taps @ rotation.T - taps,
    "anything": 2.5 * torch.randn(9, 2),
}
figure, axes = plt.subplots(1, len(kinds), figsize=(11, 2.6), layout="constrained")
for ax, (name, moves) in zip(axes, kinds.items(), strict=True):
    image = torch.zeros(1, 1, 32, 32, requires_grad=True)
    output = deform_conv2d(image, field(moves), torch.ones(1, 1, 3, 3), padding=1)
    (weights,) = torch.autograd.grad(output[0, 0, 16, 16], image)
    ax.imshow(weights[0, 0].numpy(), cmap="Greys", vmin=0, vmax=1)
    y, x = (16 + taps + moves).T.numpy()
    ax.scatter(x, y, s=14, color="#d55e00", zorder=2)
    ax.plot(16, 16, marker="P", color="#56b4e9", markersize=9, markeredgecolor="black")
    ax.set(title=name, xlim=(8.5, 23.5), ylim=(23.5, 8.5), xticks=[], yticks=[])
plt.show()

# %%
# Blue is the output's own position, orange the taps, grey the weight with which a cell counts.
#
# Offsets have gradients as well, so a network can learn them: that is what
# :class:`deformnet.nn.DeformConv2d` does, with a small convolution of its own that makes them. What
# happens at the border of the map is a rule with two names; see :doc:`/operators`.
