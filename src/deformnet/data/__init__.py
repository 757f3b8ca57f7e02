"""Images and labels: readers of the common layouts, transforms, and a made data set."""

from deformnet.data.base import IGNORE
from deformnet.data.cityscapes import CityscapesSegmentation
from deformnet.data.segmentation import open_segmentation
from deformnet.data.shapes import Shapes, write_shapes
from deformnet.data.transforms import evaluation_transforms, training_transforms
from deformnet.data.voc import VOCSegmentation

__all__ = [
    "IGNORE",
    "CityscapesSegmentation",
    "Shapes",
    "VOCSegmentation",
    "evaluation_transforms",
    "open_segmentation",
    "training_transforms",
    "write_shapes",
]
