"""What each kind of network is trained and evaluated for: segmentation, detection, classification.

`task_of` is the only place that knows which recipe belongs to which task.
"""

from deformnet._errors import require_extra

require_extra(__name__, "train", "torchvision", "torchmetrics", "tqdm")

from deformnet.recipes import ClassifierRecipe, DetectorRecipe, Recipe, SegmentationRecipe
from deformnet.tasks.base import DataIdentity, Processes, Task, TaskOptions
from deformnet.tasks.classification import ClassificationTask, ImageClass
from deformnet.tasks.detection import DetectionTask
from deformnet.tasks.detection.data import Boxes
from deformnet.tasks.images import find_images
from deformnet.tasks.predictor import Predictor
from deformnet.tasks.segmentation import LabelMap, SegmentationTask

__all__ = [
    "Boxes",
    "DataIdentity",
    "ImageClass",
    "LabelMap",
    "Predictor",
    "Processes",
    "Task",
    "TaskOptions",
    "find_images",
    "task_of",
]


def task_of(recipe: Recipe, options: TaskOptions | None = None) -> Task:
    """The task of a recipe's network, with options of evaluation and prediction.

    Raises:
        UserError: for options that the task does not have.
    """
    options = options or TaskOptions()
    match recipe:
        case SegmentationRecipe():
            return SegmentationTask(recipe, options)
        case DetectorRecipe():
            return DetectionTask(recipe, options)
        case ClassifierRecipe():
            return ClassificationTask(recipe, options)
    raise TypeError(f"expected the recipe of a known task, but got {type(recipe).__name__}")
