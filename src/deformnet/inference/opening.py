"""From a run folder to what predicts with it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from deformnet.inference.classification import ClassificationPredictor
from deformnet.inference.detection import DetectionPredictor
from deformnet.inference.segmentation import SegmentationPredictor
from deformnet.models.classifier import Classifier
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Detector
from deformnet.models.detection.rpn import RPNDetector
from deformnet.recipes import (
    ClassifierRecipe,
    DeepLabRecipe,
    TestTimeAugmentation,
    DetectorRecipe,
)
from deformnet.engine.runs import load_run


def open_predictor(
    run: Path,
    *,
    testing: TestTimeAugmentation = TestTimeAugmentation(),
    device: torch.device | str | None = None,
) -> SegmentationPredictor | DetectionPredictor | ClassificationPredictor:
    """The predictor of a run folder, whatever its network is.

    Args:
        run: a run folder.
        testing: of a detector: several sizes, mirrored images, refined and averaged boxes.
        device: where to compute; None takes a GPU if there is one.
    Raises:
        FileNotFoundError, ValueError: as `deformnet.engine.runs.load_run`; also for a detector that was
            trained on stored proposals, and for options of testing that the network does not have.
    """
    recipe, model, trained_on = load_run(run)
    if testing != TestTimeAugmentation() and not isinstance(recipe, DetectorRecipe):
        raise ValueError(f"{run}: options of testing are for detectors, not for {recipe.network}")
    if isinstance(recipe, DeepLabRecipe) and isinstance(model, DeepLab):
        return SegmentationPredictor(recipe, model, trained_on.classes, device)
    if isinstance(recipe, ClassifierRecipe) and isinstance(model, Classifier):
        return ClassificationPredictor(recipe, model, trained_on.classes, device)
    assert isinstance(recipe, DetectorRecipe)
    assert isinstance(model, Detector)
    if trained_on.proposals:
        raise ValueError(
            f"{run}: was trained on stored proposals and makes none itself; "
            "it can be scored on stored ones, but not see other images"
        )
    return detection_predictor(recipe, model, trained_on.classes, testing, device)


def detection_predictor(
    recipe: DetectorRecipe,
    model: Detector,
    classes: Sequence[str],
    testing: TestTimeAugmentation = TestTimeAugmentation(),
    device: torch.device | str | None = None,
) -> DetectionPredictor:
    """The predictor of a detector, with the sizes and thresholds of its recipe.

    A plain region proposal network tells objects from background, whatever it was trained on: its
    only class is "object", and its proposals are suppressed as another network would get them and
    no more.
    """
    score_threshold, nms, max_detections = (
        recipe.score_threshold,
        recipe.nms,
        recipe.max_detections,
    )
    if isinstance(model, RPNDetector) and not model.class_aware:
        classes = ("object",)
        score_threshold, nms, max_detections = 0.0, model.rpn.nms, recipe.proposals
    return DetectionPredictor(
        model,
        classes,
        short_side=recipe.short_side,
        max_side=recipe.max_side,
        score_threshold=score_threshold,
        nms=nms,
        max_detections=max_detections,
        testing=testing,
        device=device,
    )
