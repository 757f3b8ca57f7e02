"""
Make any model deformable
=========================

:func:`deformnet.nn.deform_` replaces convolutions of a model in place. The weights stay, the
offsets start at zero, and so the model computes what it did before, until it is trained on.
"""

# %%
# Convert
# -------
# The names are those of ``model.named_modules()``, with ``*`` for anything. A name that fits
# nothing is an error.

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
print(f"largest difference: {(model(images) - plain(images)).abs().max():.1e}")

# %%
# A name with a slip in it is answered with those that are near, and nothing is changed.

try:
    deform_(model, "layer4.*.convv2")
except ValueError as error:
    print(error)

# %%
# Train
# -----
# The layers that make offsets often want a smaller learning rate than the rest.
# :func:`deformnet.nn.parameter_groups` gives the groups that an optimiser takes; weight decay goes
# there, and not to the optimiser, since biases and batch norm have none.

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
    print(f"{name}: largest weight of the offsets {layer.conv_offset.weight.abs().max():.1e}")

# %%
# The offsets' weights are not zero any more: the model has begun to look elsewhere.
#
# What it costs
# -------------
# Offsets are made by a convolution with 18 channels, and reading between pixels takes some
# arithmetic. Times are those of the machine that built this page.

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
