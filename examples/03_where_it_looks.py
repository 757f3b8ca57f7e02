"""
Sampling locations
==================

Figure 6 of the paper shows the image points that a unit samples through three deformable layers:
9, 81 and 729 of them. :func:`deformnet.analysis.record_sampling` computes them for any model with
deformable layers.

Here a small network learns a task that needs a large receptive field: predicting, at every pixel,
the radius of the disc that it belongs to. Three plain layers see 28 pixels of the image; discs
have diameters of up to 60.
"""

# %%
# A task and a network
# --------------------

import torch
from torch import Tensor, nn

from deformnet import deform_, parameter_groups

SIDE = 96


def discs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 1, SIDE, SIDE] of two discs, and a tenth of the radius per pixel."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    radii = torch.zeros(count, 1, SIDE, SIDE)
    for image, radius in zip(images, radii, strict=True):
        for low, high, column in ((5, 9, 18), (18, 30, 62)):
            r = low + (high - low) * float(torch.rand((), generator=generator))
            row = r + (SIDE - 2 * r) * float(torch.rand((), generator=generator))
            inside = (y - row) ** 2 + (x - column) ** 2 < r**2
            image[0][inside] += 1
            radius[0][inside] = r / 10
    return images, radii


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


torch.manual_seed(0)
model = nn.Sequential(
    *(block(1, 16, 2), block(16, 32, 2), block(32, 32, 1), block(32, 32, 1), block(32, 32, 1)),
    nn.Conv2d(32, 1, 1),
)
layers = deform_(model, "[234].0")

# %%
# Training
# --------
# A few seconds are enough for the offsets to move. Their learning rate is a tenth of the base rate.

generator = torch.Generator().manual_seed(0)
optimizer = torch.optim.Adam(parameter_groups(model, lr=0.01, offset_lr_scale=0.1))
for iteration in range(200):
    images, radii = discs(8, generator)
    loss = (model(images) - radii[..., ::4, ::4]).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if iteration % 40 == 39:
        print(f"iteration {iteration + 1}: mean error {10 * loss.item():.2f} pixels")

# %%
# The figure
# ----------
# After recording a single forward pass, the sampling locations of any unit can be computed. Layers
# are listed from the top down.

from deformnet.analysis import SamplingLocations, record_sampling
from deformnet.visualization import SampledUnit, sampling_figure

images, radii = discs(1, generator)
shown = (255 * (0.3 + 0.4 * images[0]).clamp(0, 1)).to(torch.uint8).expand(3, -1, -1)
radius = radii[0, 0]
places = {"background": (88.0, 88.0)}
for what, disc in (("small disc", (radius > 0) & (radius < 1)), ("large disc", radius > 1)):
    y, x = disc.nonzero().float().mean(0).tolist()
    places[what] = (y, x)
stack = record_sampling(model, images, layers[::-1])


def sampled_unit(what: str, point: tuple[float, float], at_rest: bool) -> SampledUnit:
    unit = stack.unit_at(point)
    levels = [stack.locations(unit, depth=depth, zero_offsets=at_rest) for depth in (1, 2, 3)]
    first = [
        SamplingLocations(points[0], inside[0]) for points, inside in levels
    ]  # of the first image
    return SampledUnit(shown, what, stack.center(unit), first)


rows = {
    name: [sampled_unit(what, point, at_rest) for what, point in places.items()]
    for name, at_rest in (("without offsets", True), ("with them", False))
}
figure = sampling_figure(rows)

# %%
# Without offsets, as in the untrained network, the 729 points fall on a 7x7 grid. With learned
# offsets, a unit on a large disc samples a wide area, and a unit on a small disc stays close to it.
# The range of the offsets depends on the task: where distant pixels do not help, they stay small.
#
# For a trained run, ``deformnet inspect analyze RUN --data DIR --out DIR`` draws this figure and
# more.
