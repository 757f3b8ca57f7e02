"""Images in, label maps and pictures out."""

from deformnet.inference.drawing import label_image, overlay, palette
from deformnet.inference.segmentation import (
    SegmentationPredictor,
    find_images,
    predict_files,
)

__all__ = [
    "SegmentationPredictor",
    "find_images",
    "label_image",
    "overlay",
    "palette",
    "predict_files",
]
