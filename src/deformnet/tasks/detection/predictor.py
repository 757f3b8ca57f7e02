"""Boxes around the objects of images.

Dai et al. 2017, section 4.3 and Table 5: multi-scale testing, and iterative bounding box averaging
(Gidaris and Komodakis 2015, "Object detection via a multi-region and semantic segmentation-aware
CNN model", section 5).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from deformnet._errors import UserError
from deformnet.analysis import bin_locations
from deformnet.metrics.detections import Record
from deformnet.models.detection.detector import (
    Candidates,
    Detections,
    Detector,
    Features,
    Proposals,
    Size,
)
from deformnet.models.detection.postprocess import merge, postprocess
from deformnet.models.detection.rpn import RPNDetector
from deformnet.recipes import DetectorRecipe, TestTimeAugmentation
from deformnet.tasks.annotations import Annotation
from deformnet.tasks.detection.data import Boxes
from deformnet.tasks.detection.files import listing_boxes
from deformnet.tasks.images import require_image
from deformnet.tasks.predictor import (
    Add,
    Bins,
    Device,
    Inference,
    Predictor,
    Prepared,
    preparation,
)
from deformnet.tasks.results import BoxFormat, encoded

_BOXES_AT_ONCE = 1000  # boxes whose pooled features are in memory at a time


class Limits(NamedTuple):
    """Which candidates of a detector are detections; see `postprocess`."""

    score_threshold: float
    nms: float
    max_detections: int

    @classmethod
    def of(cls, recipe: DetectorRecipe, model: Detector) -> "Limits":
        """Proposals are only filtered by the non-maximum suppression that precedes a detector."""
        if recipe.class_agnostic:
            return cls(0.0, cast(RPNDetector, model).rpn.nms, recipe.proposals)
        return cls(recipe.score_threshold, recipe.nms, recipe.max_detections)


class BoxPredictor(Predictor[Detections, Boxes]):
    """Predicts the objects of an image, with boxes in pixels of the image.

    `write` writes a file with all detections (see `deformnet.tasks.detection.files`) and, for
    `photo.jpg`, the picture `pictures/photo.jpg` with the boxes that score at least `threshold`.
    """

    has_boxes: ClassVar[bool] = True
    folders: ClassVar[dict[str, str]] = {"pictures": ".jpg"}

    def record(self, name: str, detections: Detections) -> Record:
        """The detections of an image of this name, with the names of their classes."""
        names = [self.classes[label] for label in detections.labels.tolist()]
        return Record(name, detections.boxes, detections.scores, names)

    def _pictures(self, annotation: Boxes, threshold: float) -> dict[str, bytes]:
        return {"pictures": encoded(annotation.plot(threshold=threshold), ".jpg")}

    def _listed(self, out: Path, box_format: BoxFormat) -> AbstractContextManager[Add[Boxes]]:
        return listing_boxes(out, box_format, self.classes)

    def _annotation(self, prediction: Detections, size: Size, image: Tensor | None = None) -> Boxes:
        boxes, scores, labels = prediction
        return Boxes(boxes, labels, self.classes, size, scores, image)


class WholePredictor(BoxPredictor):
    """Predicts with an exported detector, which includes all stages; see `WholeDetector`."""

    def _predict(self, prepared: Prepared, size: Size) -> Detections:
        boxes, scores, labels = (part.cpu() for part in self.model(prepared.input))
        found = labels >= 0
        boxes = _rescaled(boxes[found], prepared.size, size)
        return Detections(boxes, scores[found], labels[found])


class DetectionPredictor(BoxPredictor):
    """Predicts with a network, stage by stage; see `BoxPredictor`.

    Args:
        recipe: image sizes and thresholds. Proposals of a region proposal network are only filtered
            by the non-maximum suppression that precedes a detector.
        model: the network.
        classes: class names of the training data. A region proposal network predicts the single
            class "object", whatever it was trained on.
        augmentation: test-time augmentation; `max_side` is scaled in proportion to the scales.
        device: device to run on; None uses a GPU if there is one.
    Raises:
        ValueError: if the model has another number of classes, or if `augmentation` refines the
            boxes of a model that takes no proposals.
    """

    def __init__(
        self,
        recipe: DetectorRecipe,
        model: Detector,
        classes: Sequence[str],
        augmentation: TestTimeAugmentation = TestTimeAugmentation(),  # noqa: B008 (frozen)
        device: Device = None,
    ) -> None:
        classes = model.reported_classes(classes)
        if len(classes) != model.num_classes:
            raise ValueError(
                f"expected classes to name the {model.num_classes} classes of the model, but got "
                f"{len(classes)}"
            )
        if augmentation.refine > 1 and not model.takes_proposals:
            raise UserError(
                f"expected refine to be 1 for {type(model).__name__}, which takes no boxes to "
                f"refine, but got {augmentation.refine}"
            )
        side, bound = recipe.short_side, recipe.max_side
        upright, interpolation = recipe.orientation != "stored", recipe.interpolation
        super().__init__(
            *(model, classes, side, bound, device), upright=upright, interpolation=interpolation
        )
        self._network = cast(Detector, self.model)
        self.pooling = model.deformable_pooling
        self.sees_conv5 = model.uses_conv5
        limits = Limits.of(recipe, model)
        self._score_threshold, self._augmentation = limits.score_threshold, augmentation
        self._postprocess = partial(
            postprocess,
            **limits._asdict(),
            soft_nms=augmentation.soft_nms,
            box_averaging=augmentation.box_averaging,
        )
        self._scales = [
            preparation(
                scale, None if bound is None else round(scale * bound / side), interpolation
            )
            for scale in augmentation.scales or (side,)
        ]

    @torch.inference_mode()
    def predict(self, image: Tensor, proposals: Tensor | None = None) -> Detections:
        """The detections of an image, best first, on the CPU.

        Args:
            image: uint8 [3, H, W], RGB.
            proposals: boxes [P, 4] in pixels of `image` that replace the network's own proposals;
                they are clipped to the image.
        Raises:
            ValueError: if `proposals` have another shape or dtype or are not finite, or if the
                model takes none.
        """
        require_image(image)
        size = (image.shape[1], image.shape[2])
        if proposals is not None:
            proposals = self._checked(proposals, size)
        candidates: list[Candidates] = []
        for prepare in self._scales:
            upright = prepare(image)[None].to(self.device, memory_format=torch.channels_last)
            for flipped in (False, True) if self._augmentation.flip else (False,):
                batch = upright.flip(3) if flipped else upright
                batch_size = (batch.shape[2], batch.shape[3])
                given = None
                if proposals is not None:
                    given = _rescaled(proposals, size, batch_size)
                    given = _flipped(given, batch_size) if flipped else given
                features = self._network.features(batch)
                for boxes, scores in self._passes(features, batch_size, given):
                    there = _flipped(boxes, batch_size) if flipped else boxes
                    candidates.append(Candidates(_rescaled(there, batch_size, size), scores))
        return self._detections(candidates)

    def arguments(self, prepared: Prepared) -> tuple[object, ...]:
        return prepared.input, [prepared.size]

    @torch.no_grad()
    def infer(self, prepared: Prepared, size: Size) -> Inference:
        features = self._network.features(prepared.input)
        annotation = self._annotation(self._of_features(features, prepared, size), size)
        return Inference(annotation, partial(self._bins, features, prepared))

    def _predict(self, prepared: Prepared, size: Size) -> Detections:
        return self._of_features(self._network.features(prepared.input), prepared, size)

    def _of_features(self, features: Features, prepared: Prepared, size: Size) -> Detections:
        passes = self._passes(features, prepared.size, None)
        return self._detections(
            [Candidates(_rescaled(boxes, prepared.size, size), scores) for boxes, scores in passes]
        )

    @torch.inference_mode()
    def propose(self, image: Tensor) -> Proposals:
        """The region proposals of an image, at the size of training without augmentation.

        Args:
            image: uint8 [3, H, W], RGB.
        Returns:
            Boxes in pixels of `image` and their scores, best first, on the CPU.
        """
        prepared = self.prepare(image)
        features = self._network.features(prepared.input)
        boxes, scores = self._network.propose(features, [prepared.size])[0]
        boxes = _rescaled(boxes.float(), prepared.size, (image.shape[1], image.shape[2]))
        return Proposals(boxes.cpu(), scores.float().cpu())

    def _detections(self, candidates: list[Candidates]) -> Detections:
        """Post-processes all candidates of an image."""
        # Mixed precision would average the corners of boxes to within several pixels.
        with torch.autocast(self.device.type, enabled=False):
            detections = self._postprocess(merge(candidates))
        return Detections(*(values.cpu() for values in detections))

    def _checked(self, proposals: Tensor, size: Size) -> Tensor:
        """Stored proposals as the model takes them, still in pixels of the image."""
        if not self._network.takes_proposals:
            raise ValueError(
                f"expected no proposals for {type(self.model).__name__}, which takes none"
            )
        if proposals.ndim != 2 or proposals.shape[1] != 4 or not proposals.is_floating_point():
            raise ValueError(
                "expected proposals to be floating-point [P, 4], but got "
                f"{proposals.dtype} {list(proposals.shape)}"
            )
        if not proposals.isfinite().all():
            raise ValueError("expected proposals to be finite, but got NaN or infinity")
        return clip_boxes_to_image(proposals.to(self.device, torch.float32), size)

    def _passes(self, features: Features, size: Size, proposals: Tensor | None) -> list[Candidates]:
        """The candidates of each pass through the detector, in pixels of the network's input.

        As Gidaris and Komodakis do it: the boxes of a pass are the proposals of the next, and
        class-specific boxes are scored again for their class alone. Boxes below the score threshold
        are not passed on.
        """
        if not self._network.takes_proposals:
            return [self._candidates(features, size, features.last.new_zeros(0, 4))]
        if proposals is None:
            proposals = self._network.propose(features, [size])[0].boxes
        passes = [self._candidates(features, size, proposals)]
        for _ in range(self._augmentation.refine - 1):
            boxes, scores = passes[-1]
            kept = scores > self._score_threshold
            if boxes.ndim == 2:
                kept = kept.any(dim=1) & boxes.isfinite().all(dim=-1)
                passes.append(self._candidates(features, size, boxes[kept]))
            else:
                rows, labels = (kept & boxes.isfinite().all(dim=-1)).nonzero(as_tuple=True)
                again = self._candidates(features, size, boxes[rows, labels])
                own = F.one_hot(labels, scores.shape[1]).bool()
                passes.append(Candidates(again.boxes, again.scores.where(own, 0.0)))
        return passes

    def _candidates(self, features: Features, size: Size, proposals: Tensor) -> Candidates:
        """The model's candidates of one image in float32, a limited number of boxes at a time."""
        parts = [
            self._network.candidates(features, [size], [some])[0]
            for some in proposals.split(_BOXES_AT_ONCE)
        ]
        return Candidates(*(values.float() for values in merge(parts)))

    def _bins(self, features: Features, prepared: Prepared, boxes: Annotation) -> Bins | None:
        """The bins of predicted boxes; see `Inference`."""
        if self.pooling is None:
            return None
        scale = torch.tensor([*reversed(prepared.scale)] * 2)
        rois = (boxes.boxes * scale).to(prepared.input)
        network, arguments = self._network, (features, [prepared.size], [rois])
        bins = bin_locations(network, self.pooling, *arguments, call=network.candidates)
        # The background comes first.
        groups = torch.tensor([self.classes.index(name) + 1 for name in boxes.names])
        moved = bins.of_groups(groups.long())
        return Bins(bins.regular.cpu() / scale, moved.cpu() / scale)


def _flipped(boxes: Tensor, size: Size) -> Tensor:
    """Boxes [..., 4] in an image of this height and width, after a horizontal flip."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    return torch.stack([size[1] - x2, y1, size[1] - x1, y2], dim=-1)


def _rescaled(boxes: Tensor, size: Size, new_size: Size) -> Tensor:
    """Boxes [..., 4] in an image of height and width `size`, after its resizing to `new_size`."""
    (height, width), (new_height, new_width) = size, new_size
    # Multiplied, then divided, so that edges of the image stay exact.
    return (
        boxes
        * boxes.new_tensor([new_width, new_height] * 2)
        / boxes.new_tensor([width, height] * 2)
    )
