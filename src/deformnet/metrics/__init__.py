"""Scores of predictions against the truth. Takes tensors; knows no model and no data set."""

from deformnet.metrics.classification import (
    ClassificationCounts,
    ClassificationScores,
    classification_scores,
)
from deformnet.metrics.coco import coco_ap, coco_table
from deformnet.metrics.segmentation import (
    ObjectCounts,
    SegmentationScores,
    SizeScores,
    confusion_matrix,
    segmentation_scores,
    size_scores,
)
from deformnet.metrics.voc import Found, Method, Truth, VOCScores, voc_ap, voc_table

__all__ = [
    "ClassificationCounts",
    "ClassificationScores",
    "Found",
    "Method",
    "ObjectCounts",
    "SegmentationScores",
    "SizeScores",
    "Truth",
    "VOCScores",
    "classification_scores",
    "coco_ap",
    "coco_table",
    "confusion_matrix",
    "segmentation_scores",
    "size_scores",
    "voc_ap",
    "voc_table",
]
