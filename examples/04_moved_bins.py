"""
Deformable RoI bins
===================

Deformable RoI pooling shifts the bins of a box to the parts of the object (Figure 7 of the paper).
:func:`deformnet.analysis.bin_locations` computes their positions.

Here the task rewards moving bins: predict the color of a bar somewhere in a box full of other
colors. The prediction is the mean over all bins, so it is only correct if the bins lie on the bar.
"""

# %%
# A task and a network
# --------------------
# The bins read the colors of the image; only their positions are learned. The layer computes
# offsets from the features of two convolutions, as in Figure 4 of the paper.

import torch
from torch import Tensor, nn

from deformnet import DeformPSRoIPool2d, parameter_groups

SIDE, BOX = 64, (8.0, 8.0, 55.0, 55.0)  # the first and the last pixel of the box


def bars(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 3, SIDE, SIDE] of a bar on darker patches, and its color [count, 3]."""
    y, x = torch.meshgrid(torch.arange(SIDE) - 31.5, torch.arange(SIDE) - 31.5, indexing="ij")
    patches = 0.4 * torch.rand(count, 3, SIDE // 8, SIDE // 8, generator=generator)
    images = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)
    colors = 0.5 + 0.5 * torch.rand(count, 3, generator=generator)
    angle = (torch.pi * torch.rand(count, generator=generator))[:, None, None]
    aside = 10 * (2 * torch.rand(count, generator=generator) - 1)[:, None, None]
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    bar = ((across - aside).abs() < 8) & (along.abs() < 24)
    return torch.where(bar[:, None], colors[:, :, None, None], images), colors


class Colors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
            nn.Upsample(scale_factor=4),
        )
        self.pool = DeformPSRoIPool2d(32, output_size=3, sampling="aligned")

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        maps = images.repeat_interleave(9, dim=1)  # nine maps of each color, one per bin
        return self.pool(maps, self.features(images), boxes).mean((2, 3))


# %%
# Training
# --------


def boxes_of(images: Tensor) -> Tensor:
    return torch.tensor([[index, *BOX] for index in range(len(images))])


torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
model = Colors()
optimizer = torch.optim.Adam(parameter_groups(model, lr=3e-3))
for iteration in range(300):
    images, colors = bars(16, generator)
    loss = (model(images, boxes_of(images)) - colors).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if iteration % 60 == 0 or iteration == 299:
        print(f"iteration {iteration}: mean error {loss.item():.3f}")

# %%
# The figure
# ----------

from deformnet.analysis import bin_locations
from deformnet.visualization import DetectionBins, bins_figure

images, _ = bars(6, generator)
boxes = boxes_of(images)
bins = bin_locations(model, "pool", images, boxes)
detections = [
    DetectionBins((255 * image).to(torch.uint8), "a bar", box[1:], plain, moved)
    for image, box, plain, moved in zip(
        images, boxes, bins.regular, bins.deformed[:, 0], strict=True
    )
]
figure = bins_figure(detections)

# %%
# Bins keep their size; they can only move. In a detector, the paper's layers have separate offsets
# for every class, and :meth:`~deformnet.analysis.BinLocations.of_groups` selects those of a
# detection. They are learned from boxes and classes alone, so bins move less clearly than here.
