"""Images in; label maps or boxes, and pictures out."""

from deformnet.inference.detection import DetectionPredictor, DetectionTesting
from deformnet.inference.drawing import label_image, overlay, palette
from deformnet.inference.opening import detection_predictor, open_predictor
from deformnet.inference.segmentation import (
    SegmentationPredictor,
    find_images,
    predict_files,
)

__all__ = [
    "DetectionPredictor",
    "DetectionTesting",
    "SegmentationPredictor",
    "detection_predictor",
    "find_images",
    "label_image",
    "open_predictor",
    "overlay",
    "palette",
    "predict_files",
]
