"""Scores of predictions against the truth. Takes tensors; knows no model and no data set."""

from deformnet.evaluation.segmentation import (
    ObjectCounts,
    SegmentationScores,
    SizeScores,
    confusion_matrix,
    segmentation_scores,
    size_scores,
)

__all__ = [
    "ObjectCounts",
    "SegmentationScores",
    "SizeScores",
    "confusion_matrix",
    "segmentation_scores",
    "size_scores",
]
