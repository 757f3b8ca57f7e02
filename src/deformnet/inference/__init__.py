"""Images in; classes, label maps or boxes, and pictures out."""

from deformnet.inference.classification import ClassificationPredictor, predict_classes
from deformnet.inference.detection import (
    DetectionPredictor,
    TestTimeAugmentation,
    predict_detections,
)
from deformnet.visualization.drawing import draw_boxes, label_image, overlay, palette
from deformnet.inference.files import find_images
from deformnet.inference.opening import detection_predictor, open_predictor
from deformnet.inference.preparing import Prepared
from deformnet.inference.segmentation import SegmentationPredictor, predict_files

__all__ = [
    "ClassificationPredictor",
    "DetectionPredictor",
    "TestTimeAugmentation",
    "Prepared",
    "SegmentationPredictor",
    "detection_predictor",
    "draw_boxes",
    "find_images",
    "label_image",
    "open_predictor",
    "overlay",
    "palette",
    "predict_classes",
    "predict_detections",
    "predict_files",
]
