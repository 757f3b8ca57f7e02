"""Images with labels or boxes: readers of the common layouts, transforms, and a made data set."""

from deformnet.data.base import IGNORE
from deformnet.data.boxes import BoxAnnotations, DetectionDataset
from deformnet.data.cityscapes import CityscapesSegmentation
from deformnet.data.coco import COCODetection
from deformnet.data.detection import detection_splits, open_detection
from deformnet.data.segmentation import open_segmentation
from deformnet.data.shapes import Shapes, write_shapes
from deformnet.data.transforms import (
    detection_transforms,
    evaluation_transforms,
    training_transforms,
)
from deformnet.data.voc import VOCDetection, VOCSegmentation

__all__ = [
    "IGNORE",
    "BoxAnnotations",
    "COCODetection",
    "CityscapesSegmentation",
    "DetectionDataset",
    "Shapes",
    "VOCDetection",
    "VOCSegmentation",
    "detection_splits",
    "detection_transforms",
    "evaluation_transforms",
    "open_detection",
    "open_segmentation",
    "training_transforms",
    "write_shapes",
]
