"""From a run folder to what predicts with it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from deformnet.inference.detection import DetectionPredictor, DetectionTesting
from deformnet.inference.segmentation import SegmentationPredictor
from deformnet.models.deeplab import DeepLab
from deformnet.models.detector import Detector
from deformnet.recipes import DeepLabRecipe, DetectorRecipe, RPNRecipe
from deformnet.runs import load_run

_ONE_LOOK = DetectionTesting()


def open_predictor(
    run: Path,
    *,
    testing: DetectionTesting = _ONE_LOOK,
    device: torch.device | str | None = None,
) -> SegmentationPredictor | DetectionPredictor:
    """The predictor of a run folder, whatever its network is.

    Args:
        run: a run folder.
        testing: of a detector: several sizes, mirrored images, refined and averaged boxes.
        device: where to compute; None takes a GPU if there is one.
    Raises:
        FileNotFoundError, ValueError: as `deformnet.runs.load_run`; also for a detector that was
            trained on stored proposals, and for options of testing that the network does not have.
    """
    recipe, model, trained_on = load_run(run)
    if isinstance(recipe, DeepLabRecipe) and isinstance(model, DeepLab):
        if testing != _ONE_LOOK:
            raise ValueError(f"{run}: options of testing are for detectors, not for deeplab")
        return SegmentationPredictor(recipe, model, trained_on.classes, device)
    assert isinstance(recipe, DetectorRecipe)
    assert isinstance(model, Detector)
    if trained_on.proposals:
        raise ValueError(
            f"{run}: was trained on stored proposals and makes none itself; "
            "it can be scored on stored ones, but not see other images"
        )
    # A region proposal network tells objects from background, whatever it was trained on.
    names = ("object",) if isinstance(recipe, RPNRecipe) else trained_on.classes
    return detection_predictor(recipe, model, names, testing, device)


def detection_predictor(
    recipe: DetectorRecipe,
    model: Detector,
    classes: Sequence[str],
    testing: DetectionTesting = _ONE_LOOK,
    device: torch.device | str | None = None,
) -> DetectionPredictor:
    """The predictor of a detector, with the sizes and thresholds of its recipe."""
    return DetectionPredictor(
        model,
        classes,
        short_side=recipe.short_side,
        max_side=recipe.max_side,
        score_threshold=recipe.score_threshold,
        nms=recipe.nms,
        max_detections=recipe.max_detections,
        testing=testing,
        device=device,
    )
