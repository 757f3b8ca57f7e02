"""Readers of data sets with classes, label maps or boxes; transforms; synthetic data sets."""

from deformnet._errors import require_extra

require_extra(__name__, "train", "torchvision", "PIL", "tqdm", "yaml")

from deformnet.data.base import IGNORE
from deformnet.data.boxes import BoxAnnotations, DetectionDataset
from deformnet.data.cityscapes import CityscapesSegmentation
from deformnet.data.coco import COCODetection
from deformnet.data.coco_masks import COCOSegmentation
from deformnet.data.image_folder import ImageFolderClassification, image_folder_splits
from deformnet.data.labelme import LabelmeDetection, LabelmeSegmentation
from deformnet.data.location import DataFiles, Location
from deformnet.data.masks import FolderSegmentation
from deformnet.data.opening import (
    classification_splits,
    detection_splits,
    open_classification,
    open_detection,
    open_segmentation,
    segmentation_splits,
)
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.data.transforms import (
    classification_evaluation_transforms,
    classification_training_transforms,
    detection_transforms,
    segmentation_evaluation_transforms,
    segmentation_training_transforms,
)
from deformnet.data.voc import VOCDetection, VOCSegmentation
from deformnet.data.voc_folders import VOCFolderDetection
from deformnet.data.yolo import YOLODetection, YOLOSegmentation

__all__ = [
    "IGNORE",
    "BoxAnnotations",
    "COCODetection",
    "COCOSegmentation",
    "CityscapesSegmentation",
    "DataFiles",
    "DetectionDataset",
    "FolderSegmentation",
    "ImageFolderClassification",
    "LabelmeDetection",
    "LabelmeSegmentation",
    "Location",
    "Shapes",
    "VOCDetection",
    "VOCFolderDetection",
    "VOCSegmentation",
    "YOLODetection",
    "YOLOSegmentation",
    "classification_evaluation_transforms",
    "classification_splits",
    "classification_training_transforms",
    "detection_splits",
    "detection_transforms",
    "image_folder_splits",
    "open_classification",
    "open_detection",
    "open_segmentation",
    "segmentation_evaluation_transforms",
    "segmentation_splits",
    "segmentation_training_transforms",
    "write_shapes",
]
