"""Object detection, region proposals included."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from deformnet._errors import UserError
from deformnet.data.boxes import DetectionDataset
from deformnet.data.coco import COCODetection
from deformnet.data.detection import detection_splits, open_detection
from deformnet.models.detection.detector import Detector
from deformnet.models.detection.rpn import RPNDetector
from deformnet.recipes import DetectorRecipe, TestTimeAugmentation
from deformnet.tasks.annotations import AnnotatedImages
from deformnet.tasks.base import DataIdentity, Task, TaskOptions, require_classes
from deformnet.tasks.detection.data import Boxes, DetectionTrainingSet
from deformnet.tasks.detection.evaluation import (
    DetectionEvaluationSet,
    DetectionProposalSet,
    MakePredictor,
    PrecisionSet,
    RecallSet,
    SubmissionSet,
)
from deformnet.tasks.detection.predictor import DetectionPredictor
from deformnet.tasks.proposals import StoredProposals

__all__ = ["DetectionPredictor", "DetectionTask", "detection_predictor"]


class DetectionTask(Task):
    """Object detection; data in VOC or COCO layout."""

    accepts = ("augmentation", "proposals")

    def __init__(self, recipe: DetectorRecipe, options: TaskOptions) -> None:
        super().__init__(recipe, options)
        self._recipe = recipe
        if options.proposals and not recipe.takes_proposals:
            raise UserError(
                f"expected no stored proposals for {recipe.network}, which makes its own"
            )
        self._proposals = StoredProposals(options.proposals) if options.proposals else None
        terms = () if self._proposals is not None else ("rpn_class", "rpn_box")
        self.loss_terms = (*terms, "class", "box") if recipe.takes_proposals else terms

    def splits(self, root: Path) -> list[str]:
        return detection_splits(root)

    def training_set(self, root: Path, split: str) -> DetectionTrainingSet:
        return DetectionTrainingSet(self._recipe, self._open(root, split), self._proposals)

    def evaluation_set(
        self, root: Path, split: str, trained_on: DataIdentity | None = None
    ) -> DetectionEvaluationSet:
        if trained_on is not None and trained_on.proposals and self._proposals is None:
            raise UserError(
                "expected stored proposals to evaluate with, because the network was trained on "
                "stored proposals"
            )
        images = self._open(root, split)
        require_classes(root, images.classes, trained_on)
        if self._recipe.class_agnostic:
            return RecallSet(images, self._proposals, self._predictor_for(images.classes))
        predictor = self._predictor_for(images.classes)
        if isinstance(images, COCODetection) and not images.has_ground_truth:
            return SubmissionSet(images, self._proposals, predictor, self.network)
        method = "11-point" if self._recipe.convention == "msra2017" else "area"
        return PrecisionSet(images, self._proposals, predictor, method)

    def proposal_set(
        self, root: Path, split: str, trained_on: DataIdentity
    ) -> DetectionProposalSet:
        _require_own_proposals(trained_on)
        images = self._open(root, split)
        return DetectionProposalSet(images, self._predictor_for(trained_on.classes))

    def annotated(
        self, root: Path, split: str, trained_on: DataIdentity | None = None
    ) -> AnnotatedImages:
        images = self._open(root, split)
        require_classes(root, images.classes, trained_on)
        if not images.has_ground_truth:
            raise UserError(f"{root}: expected objects to look at, but none are published")

        def load(index: int) -> tuple[Tensor, Boxes]:
            image, (boxes, labels, _) = images[index]
            size = (image.shape[1], image.shape[2])
            known = Boxes(boxes.as_subclass(Tensor), labels, images.classes, size)
            return image.as_subclass(Tensor), known

        return AnnotatedImages(images, load, images.classes, "Objects are all annotated boxes")

    def predictor(
        self,
        model: nn.Module,
        trained_on: DataIdentity,
        device: torch.device | str | None = None,
    ) -> DetectionPredictor:
        _require_own_proposals(trained_on)
        return detection_predictor(
            self._recipe,
            cast(Detector, model),
            trained_on.classes,
            self.options.augmentation,
            device,
        )

    def freeze(self, model: nn.Module) -> None:
        if self._proposals is not None:
            cast(Detector, model).freeze_rpn()

    def _open(self, root: Path, split: str) -> DetectionDataset:
        images = open_detection(root, split)
        if self._proposals is not None:
            for index in range(len(images)):
                self._proposals.require(images.name(index))
        return images

    def _predictor_for(self, classes: tuple[str, ...]) -> MakePredictor:
        def make(model: nn.Module, device: torch.device) -> DetectionPredictor:
            augmentation = self.options.augmentation
            return detection_predictor(
                self._recipe, cast(Detector, model), classes, augmentation, device
            )

        return make


def detection_predictor(
    recipe: DetectorRecipe,
    model: Detector,
    classes: tuple[str, ...],
    augmentation: TestTimeAugmentation = TestTimeAugmentation(),  # noqa: B008 (frozen)
    device: torch.device | str | None = None,
) -> DetectionPredictor:
    """The predictor of a detector, with the sizes and thresholds of its recipe.

    A region proposal network predicts the single class "object", whatever it was trained on, and
    its proposals are suppressed as another network gets them and no further.
    """
    score_threshold, nms, limit = recipe.score_threshold, recipe.nms, recipe.max_detections
    if recipe.class_agnostic:
        score_threshold, nms, limit = 0.0, cast(RPNDetector, model).rpn.nms, recipe.proposals
    return DetectionPredictor(
        model,
        model.reported_classes(classes),
        short_side=recipe.short_side,
        max_side=recipe.max_side,
        score_threshold=score_threshold,
        nms=nms,
        max_detections=limit,
        augmentation=augmentation,
        device=device,
    )


def _require_own_proposals(trained_on: DataIdentity) -> None:
    if trained_on.proposals:
        raise UserError(
            "expected a network that makes proposals, but it was trained on stored ones: it can be "
            "evaluated on stored proposals, but not predict other images"
        )
