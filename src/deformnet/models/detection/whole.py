"""A detector with all of its stages in one module, for exported programs and ONNX graphs.

It computes the same as `RPN.proposals` and `postprocess`, but without data-dependent shapes:
proposals and detections are padded to a fixed number, and suppressed boxes are masked instead of
removed.
"""

import torch
from torch import Tensor, nn

from deformnet.models.detection.detector import Detections, Detector
from deformnet.models.detection.postprocess import PER_CLASS, has_area
from deformnet.models.detection.suppression import MISSING, best, suppressed


class WholeDetector(nn.Module):
    """Detects objects in an image, including proposals and non-maximum suppression.

    Args:
        detector: The network.
        score_threshold, nms, max_detections: See `postprocess`.
    """

    def __init__(
        self, detector: Detector, *, score_threshold: float, nms: float, max_detections: int
    ) -> None:
        super().__init__()
        self.detector = detector
        self.score_threshold, self.nms = score_threshold, nms
        self.max_detections = max_detections

    def forward(self, images: Tensor) -> Detections:
        """Detections of one normalized image [1, 3, H, W], in descending order of score.

        Returns:
            `max_detections` detections; missing ones come last, with score 0 and label -1.
        """
        size = (images.shape[2], images.shape[3])
        boxes, scores = self.detector.all_candidates(self.detector.features(images), size)
        boxes, scores = boxes.float(), scores.float()
        number = boxes.shape[0]  # symbolic if all anchors of an image of any size are candidates
        most = min(number, PER_CLASS) if isinstance(number, int) else PER_CLASS
        per_class = []
        for label in range(self.detector.num_classes):
            own = boxes if boxes.ndim == 2 else boxes[:, label]
            score = scores[:, label]
            valid = (score > self.score_threshold) & has_area(own)
            own, score = best(own, torch.where(valid, score, MISSING), most)
            score = suppressed(own, score, self.nms)
            own, score = best(own, score, self.max_detections)
            per_class.append(Detections(own, score, torch.full_like(score, label).long()))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*per_class, strict=True))
        scores, order = scores.sort(descending=True, stable=True)
        scores, order = scores[: self.max_detections], order[: self.max_detections]
        missing = scores == MISSING
        return Detections(
            torch.where(missing[:, None], 0.0, boxes[order]),
            torch.where(missing, 0.0, scores),
            torch.where(missing, -1, labels[order]),
        )
