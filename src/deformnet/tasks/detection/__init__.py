"""Object detection, region proposals included."""

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import Dataset

from deformnet._errors import UserError
from deformnet.data.boxes import DetectionDataset
from deformnet.data.coco import COCODetection
from deformnet.data.location import Location
from deformnet.data.opening import detection_splits, open_detection
from deformnet.models.detection.detector import Detections, Detector
from deformnet.models.detection.whole import WholeDetector
from deformnet.recipes import DetectorRecipe, TestTimeAugmentation
from deformnet.tasks.annotations import AnnotatedImages
from deformnet.tasks.base import (
    DataIdentity,
    EvaluationSet,
    ProposalSet,
    Task,
    TaskOptions,
    Whole,
)
from deformnet.tasks.detection.data import Boxes, BoxImages, DetectionTrainingSet
from deformnet.tasks.detection.evaluation import (
    DetectionEvaluationSet,
    DetectionProposalSet,
    MakePredictor,
    Samples,
    Scoring,
    precision,
    recall,
    submission,
)
from deformnet.tasks.detection.predictor import DetectionPredictor, Limits, WholePredictor
from deformnet.tasks.own import Data, OwnBoxes
from deformnet.tasks.predictor import Device
from deformnet.tasks.proposals import StoredProposals

__all__ = ["DetectionPredictor", "DetectionTask"]


class DetectionTask(Task[DetectorRecipe, BoxImages]):
    """Object detection."""

    accepts = ("augmentation", "proposals")
    pipeline_tag = "object-detection"

    def __init__(self, recipe: DetectorRecipe, options: TaskOptions) -> None:
        super().__init__(recipe, options)
        if options.proposals and not recipe.takes_proposals:
            raise UserError(
                f"expected no stored proposals for {recipe.network}, which makes its own"
            )
        self._proposals = StoredProposals(options.proposals) if options.proposals else None
        terms = () if self._proposals is not None else ("rpn_class", "rpn_box")
        self.loss_terms = (*terms, "class", "box") if recipe.takes_proposals else terms

    def evaluation_set(
        self, data: Data, split: str = "val", trained_on: DataIdentity | None = None
    ) -> EvaluationSet:
        if trained_on is not None and trained_on.proposals and self._proposals is None:
            raise UserError(
                "expected stored proposals to evaluate with, because the network was trained on "
                "stored proposals"
            )
        return super().evaluation_set(data, split, trained_on)

    def proposal_set(self, data: Data, split: str, trained_on: DataIdentity) -> ProposalSet:
        _require_own_proposals(trained_on)
        samples = Samples(self._opened(data, split))
        return DetectionProposalSet(samples, self._predictor_for(trained_on.classes))

    def predictor(
        self, model: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> DetectionPredictor:
        _require_own_proposals(trained_on)
        return self._predictor_for(trained_on.classes)(model, device)

    def whole(self, model: nn.Module, trained_on: DataIdentity, *, resize: bool = True) -> Whole:
        _require_own_proposals(trained_on)
        super().whole(model, trained_on, resize=resize)
        network = cast(Detector, model)
        whole = WholeDetector(network, **Limits.of(self.recipe, network)._asdict())
        return Whole(whole, Detections._fields, one_image=True)

    def whole_predictor(
        self, module: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> WholePredictor:
        recipe = self.recipe
        if self.options.augmentation != TestTimeAugmentation():
            raise UserError(
                "expected no test-time augmentation for an exported detector, which includes all "
                "stages; predict with the run folder"
            )
        return WholePredictor(
            module,
            ("object",) if recipe.class_agnostic else trained_on.classes,
            recipe.short_side,
            recipe.max_side,
            device,
            upright=recipe.orientation != "stored",
            interpolation=recipe.interpolation,
        )

    def freeze(self, model: nn.Module) -> None:
        if self._proposals is not None:
            cast(Detector, model).freeze_rpn()

    def _splits(self, data: Location) -> list[str]:
        return detection_splits(data)

    def _open(self, data: Location, split: str) -> DetectionDataset:
        return open_detection(data, split, orientation=self.recipe.orientation)

    def _own(self, data: Dataset[Any]) -> OwnBoxes:
        return OwnBoxes(data)

    def _opened(self, data: Data, split: str) -> BoxImages:
        images = super()._opened(data, split)
        if self._proposals is not None:
            for index in range(len(images)):
                self._proposals.require(images.name(index))
        return images

    def _training_set(self, images: BoxImages) -> DetectionTrainingSet:
        return DetectionTrainingSet(self.recipe, images, self._proposals)

    def _evaluation_set(self, images: BoxImages) -> DetectionEvaluationSet:
        samples, predictor = Samples(images, self._proposals), self._predictor_for(images.classes)
        return DetectionEvaluationSet(samples, predictor, self._scoring(images))

    def _scoring(self, images: BoxImages) -> Scoring:
        if self.recipe.class_agnostic:
            return recall(images)
        if isinstance(images, COCODetection) and not images.has_ground_truth:
            return submission(images, self.network)
        return precision(images, "11-point" if self.recipe.convention == "msra2017" else "area")

    def _annotated(self, images: BoxImages) -> AnnotatedImages:
        if not images.has_ground_truth:
            raise UserError(f"{images.root}: expected objects to look at, but none are published")

        def load(index: int) -> tuple[Tensor, Boxes]:
            image, (boxes, labels, _) = images[index]
            size = (image.shape[1], image.shape[2])
            known = Boxes(boxes.as_subclass(Tensor), labels, images.classes, size)
            return image.as_subclass(Tensor), known

        return AnnotatedImages(images, load, images.classes, "Objects are all annotated boxes")

    def _predictor_for(self, classes: tuple[str, ...]) -> MakePredictor:
        recipe, augmentation = self.recipe, self.options.augmentation
        return lambda model, device: DetectionPredictor(
            recipe, cast(Detector, model), classes, augmentation, device
        )


def _require_own_proposals(trained_on: DataIdentity) -> None:
    if trained_on.proposals:
        raise UserError(
            "expected a network that makes proposals, but it was trained on stored ones: it can be "
            "evaluated on stored proposals, but not predict other images"
        )
