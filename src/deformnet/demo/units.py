"""Which units the demo looks at, and what they sample (Dai et al. 2017, Figure 6)."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision import tv_tensors

from deformnet.analysis import SamplingLocations, sampling_locations
from deformnet.data.base import IGNORE, SegmentationDataset
from deformnet.data.transforms import evaluation_transforms
from deformnet.evaluation.segmentation import connected_regions
from deformnet.models.deeplab import DeepLab

# The last three 3x3 convolutions of a ResNet-18, from the top.
STACK = ("backbone.layer4.1.conv2", "backbone.layer4.1.conv1", "backbone.layer4.0.conv2")


@dataclass(frozen=True)
class Unit:
    """A unit of the top map.

    Attributes:
        what: what is to be seen there.
        row, column: its place in the map; its centre in the image is at `stride` times that.
    """

    what: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """An image with the units to look at: on the background, a small and a large object."""

    index: int
    units: tuple[Unit, ...]


def choose_scenes(
    images: SegmentationDataset, count: int, *, small: float, large: float, stride: int
) -> list[Scene]:
    """The first images that show a small and a large object; if these are too few, others.

    Args:
        images: without transforms.
        count: how many scenes; fewer are returned if fewer images show an object.
        small: objects of fewer pixels are small.
        large: objects of more pixels are large.
        stride: pixels between units.
    """
    fitting, others = [], []
    for index in range(len(images)):
        labels = images[index][1].numpy()
        regions = connected_regions(labels)
        masks = [regions == region for region in range(regions.max() + 1)]
        objects = [mask for mask in masks if labels[mask][0] not in (0, IGNORE)]
        if not objects:
            continue
        least, most = min(objects, key=np.count_nonzero), max(objects, key=np.count_nonzero)
        scene = Scene(
            index,
            (
                Unit("background", *_far_from(labels > 0, stride)),
                Unit(f"small {images.classes[labels[least][0]]}", *_in_middle_of(least, stride)),
                Unit(f"large {images.classes[labels[most][0]]}", *_in_middle_of(most, stride)),
            ),
        )
        sizes_fit = np.count_nonzero(least) < small and np.count_nonzero(most) > large
        seen = least[::stride, ::stride].any()
        (fitting if sizes_fit and seen else others).append(scene)
        if len(fitting) == count:
            break
    return [*fitting, *others][:count]


def locations(
    model: DeepLab, image: tv_tensors.Image, labels: tv_tensors.Mask, unit: Unit
) -> tuple[SamplingLocations, ...]:
    """What a unit samples in the map below it, in the next one, and so on down the stack.

    Args:
        image: uint8 [3, H, W], of the size that the model was trained on.
        labels: its label map.
    """
    prepare = evaluation_transforms(short_side=min(labels.shape), max_side=None)
    batch = prepare(image, labels)[0][None].to(next(model.parameters()).device)
    place, stride = (unit.row, unit.column), model.backbone.stride
    depths = range(1, len(STACK) + 1)
    found = (sampling_locations(model, batch, STACK[:n], place, stride=stride) for n in depths)
    return tuple(SamplingLocations(points[0].cpu(), inside[0].cpu()) for points, inside in found)


def _in_middle_of(mask: np.ndarray, stride: int) -> tuple[int, int]:
    """The unit in a mask [H, W] that is nearest to its centroid; the nearest at all if none is."""
    seen = mask[::stride, ::stride]
    units = np.argwhere(seen if seen.any() else ~seen)
    distance = np.linalg.norm(units * stride - np.argwhere(mask).mean(0), axis=1)
    row, column = units[distance.argmin()].tolist()
    return row, column


def _far_from(mask: np.ndarray, stride: int) -> tuple[int, int]:
    """The unit farthest from every pixel of a mask [H, W]; not at the border, if it can be."""
    free = ~mask[::stride, ::stride]
    amid = np.zeros_like(free)
    amid[1:-1, 1:-1] = free[1:-1, 1:-1]
    units = np.argwhere(amid if amid.any() else free if free.any() else ~free)
    pixels = torch.from_numpy(np.argwhere(mask)).float()
    distance = torch.cdist(torch.from_numpy(units * stride).float(), pixels).amin(1)
    row, column = units[int(distance.argmax())].tolist()
    return row, column
