"""Curves of precision and recall."""

from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which precision is given: COCO's."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """The curve of each class at an IoU of 0.5."""

    classes: tuple[str, ...]
    precision: np.ndarray
    """[C, 101]: the best precision at each of `RECALLS` or beyond it; 0 where no score is low
    enough to reach it, NaN for a class without objects."""
    scores: np.ndarray
    """[C, 101]: the score down to which detections count for that recall; 0 where it is not
    reached, NaN for a class without objects."""
    ap: tuple[float, ...]
    """AP of each class at this IoU; NaN for a class without objects."""

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file: lists as long as the recall is reached, by class."""
        lists: dict[str, dict[str, list[float]]] = {"precision": {}, "score": {}}
        for number, name in enumerate(self.classes):
            reached = np.count_nonzero(self.precision[number] > 0)
            for key, values in (("precision", self.precision), ("score", self.scores)):
                lists[key][name] = values[number, :reached].round(4).tolist()
        return {"iou": 0.5, "recall": RECALLS.round(2).tolist(), **lists}
