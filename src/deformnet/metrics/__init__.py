"""Scores of predictions against ground truth. Takes tensors and files; knows no model."""

from deformnet._errors import require_extra

require_extra(__name__, "train", "faster_coco_eval", "numpy", "scipy", "torchmetrics")

from deformnet.metrics.classification import (
    ClassificationCounts,
    ClassificationScores,
    classification_scores,
)
from deformnet.metrics.coco import COCOScores, coco_ap, coco_scores, coco_table
from deformnet.metrics.confusion import Confusion, detection_confusion
from deformnet.metrics.curves import PrecisionRecall
from deformnet.metrics.segmentation import (
    ConfusionMatrix,
    ObjectCounts,
    SegmentationScores,
    SizeScores,
    segmentation_scores,
    size_scores,
)
from deformnet.metrics.voc import GroundTruth, Method, Predictions, VOCScores, voc_ap, voc_curves

__all__ = [
    "COCOScores",
    "ClassificationCounts",
    "ClassificationScores",
    "Confusion",
    "ConfusionMatrix",
    "GroundTruth",
    "Method",
    "ObjectCounts",
    "PrecisionRecall",
    "Predictions",
    "SegmentationScores",
    "SizeScores",
    "VOCScores",
    "classification_scores",
    "coco_ap",
    "coco_scores",
    "coco_table",
    "detection_confusion",
    "segmentation_scores",
    "size_scores",
    "voc_ap",
    "voc_curves",
]
