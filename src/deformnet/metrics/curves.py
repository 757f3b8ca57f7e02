"""Precision-recall curves."""

from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which the precision is sampled, as in COCO."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """The curve of each class at an IoU of 0.5."""

    classes: tuple[str, ...]
    precision: np.ndarray
    """[C, 101]: the highest precision at each of `RECALLS` or a larger recall; 0 if the recall is
    not reached, NaN for a class without objects."""
    scores: np.ndarray
    """[C, 101]: the score threshold that gives this recall; 0 if the recall is not reached, NaN for
    a class without objects."""
    ap: tuple[float, ...]
    """AP of each class at this IoU; NaN for a class without objects."""

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file: a list per class, up to the highest recall."""
        lists: dict[str, dict[str, list[float]]] = {"precision": {}, "score": {}}
        for number, name in enumerate(self.classes):
            reached = np.count_nonzero(self.precision[number] > 0)
            for key, values in (("precision", self.precision), ("score", self.scores)):
                lists[key][name] = values[number, :reached].round(4).tolist()
        return {"iou": 0.5, "recall": RECALLS.round(2).tolist(), **lists}
