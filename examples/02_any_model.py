"""
Make any model deformable
=========================

:func:`deformnet.nn.deform_` converts convolutions of a model in place. Weights are kept and offsets
start at zero, so the output of the model stays the same until it is trained further.
"""

# %%
# Convert
# -------
# Patterns are matched against the names of ``model.named_modules()``; ``*`` matches anything. A
# pattern that matches nothing is an error.

import copy

import torch
import torchvision

from deformnet import DeformConv2d, deform_, parameter_groups
from deformnet.analysis import model_cost

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
images = torch.randn(2, 3, 128, 128)
plain = copy.deepcopy(model)

names = deform_(model, "layer4.*.conv*")
print(*names, sep="\n")
print(f"maximum difference: {(model(images) - plain(images)).abs().max():.1e}")

# %%
# The error for a misspelled pattern suggests similar names, and the model is unchanged.

try:
    deform_(model, "layer4.*.convv2")
except ValueError as error:
    print(error)

# %%
# Train
# -----
# Layers that compute offsets often need a smaller learning rate than the rest.
# :func:`deformnet.nn.parameter_groups` returns parameter groups for an optimizer. Pass weight decay
# to this function and not to the optimizer, so that it excludes biases and batch norm.

groups = parameter_groups(model, lr=0.01, offset_lr_scale=0.1, weight_decay=5e-4)
for group in groups:
    count = sum(parameter.numel() for parameter in group["params"])
    print(f"{count:>10,} parameters, lr {group['lr']:g}, weight decay {group['weight_decay']:g}")
optimizer = torch.optim.SGD(groups, momentum=0.9)

model.train()
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([3, 7]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for name in names:
    layer = model.get_submodule(name)
    assert isinstance(layer, DeformConv2d)
    print(f"{name}: largest weight of conv_offset {layer.conv_offset.weight.abs().max():.1e}")

# %%
# The weights of the offset convolutions are no longer zero, so sampling locations have started to
# move.
#
# Cost
# ----
# Each layer has an offset convolution with 18 channels, and bilinear interpolation adds some
# arithmetic. Times are from the machine that built this page.

import matplotlib.pyplot as plt

costs = {"plain": model_cost(plain, images), "deformable": model_cost(model, images)}
for kind, cost in costs.items():
    numbers = f"{cost.flops / 1e9:.3f} GFLOP, {cost.parameters:,} parameters"
    print(f"{kind}: {numbers}, {1e3 * cost.seconds:.1f} ms")
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
for place, (kind, cost) in enumerate(costs.items()):
    layers = [layer for layer in cost.layers if layer.layer in names]
    rows = [row + 0.4 * place for row in range(len(layers))]
    axes.barh(
        rows,
        [layer.flops / 1e6 for layer in layers],
        height=0.38,
        label=kind,
        color=("#999999", "#d55e00")[place],
    )
axes.set(
    xlabel="MFLOP for two images",
    yticks=[row + 0.2 for row in range(len(names))],
    yticklabels=names,
)
axes.invert_yaxis()
figure.legend(loc="outside right upper", frameon=False)
plt.show()
