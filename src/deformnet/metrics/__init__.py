"""Scores of predictions against ground truth. Takes tensors and files; knows no model."""

from deformnet._errors import require_extra

require_extra(__name__, "train", "faster_coco_eval", "numpy", "scipy", "torchmetrics")

from deformnet.metrics.classification import (
    ClassificationCounts,
    ClassificationScores,
    classification_scores,
)
from deformnet.metrics.coco import coco_ap, coco_table
from deformnet.metrics.segmentation import (
    ConfusionMatrix,
    ObjectCounts,
    SegmentationScores,
    SizeScores,
    segmentation_scores,
    size_scores,
)
from deformnet.metrics.voc import GroundTruth, Method, Predictions, VOCScores, voc_ap

__all__ = [
    "ClassificationCounts",
    "ClassificationScores",
    "ConfusionMatrix",
    "GroundTruth",
    "Method",
    "ObjectCounts",
    "Predictions",
    "SegmentationScores",
    "SizeScores",
    "VOCScores",
    "classification_scores",
    "coco_ap",
    "coco_table",
    "segmentation_scores",
    "size_scores",
    "voc_ap",
]
