"""Pictures of scores."""

from functools import partial

from deformnet.metrics.confusion import IOU, SCORE, Confusion
from deformnet.metrics.curves import RECALLS
from deformnet.metrics.scoring import DetectionScores
from deformnet.tasks.base import Pictures
from deformnet.visualization import confusion_figure, precision_recall_figure

CONFUSION = "confusion-matrix"


def confusion_picture(confusion: Confusion, things: str) -> Pictures:
    """The confusion matrix of `things`, such as pixels."""
    draw = partial(confusion_figure, confusion.counts, confusion.classes, things=things)
    return {CONFUSION: draw}


def detection_pictures(scores: DetectionScores) -> Pictures:
    """The confusion matrix of objects, and precision-recall curves."""
    confusion, curves = scores.confusion, scores.curves
    return {
        CONFUSION: partial(
            confusion_figure,
            confusion.counts,
            confusion.classes,
            things="objects",
            background=True,
            note=f"detections with a score of at least {SCORE:g} and an IoU above {IOU:g}",
        ),
        "precision-recall": partial(
            precision_recall_figure,
            curves.precision,
            RECALLS,
            curves.ap,
            confusion.counts[:-1].sum(axis=1).tolist(),
            curves.classes,
        ),
    }
