"""A detector with all of its stages in one module, for exported programs and ONNX graphs.

It computes the same as `RPN.proposals` and `postprocess`, but without data-dependent shapes:
proposals and detections are padded to a fixed number, and suppressed boxes are masked instead of
removed.
"""

import torch
from torch import Tensor, nn

from deformnet.models.detection.detector import Detections, Detector
from deformnet.models.detection.postprocess import PER_CLASS, has_area
from deformnet.models.detection.suppression import MISSING, best, suppressed, top


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
        scores = scores.T  # [C, K]
        boxes = boxes[None] if boxes.ndim == 2 else boxes.transpose(0, 1)  # [1 or C, K, 4]
        valid = (scores > self.score_threshold) & has_area(boxes)
        boxes = boxes.expand(len(scores), *boxes.shape[1:])
        boxes, scores = best(boxes, torch.where(valid, scores, MISSING), most)
        # Only non-maximum suppression needs a node per class.
        classes = zip(boxes.unbind(), scores.unbind(), strict=True)
        scores = torch.stack([suppressed(*own, self.nms) for own in classes])
        labels = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
        scores, order = top(scores.flatten(), self.max_detections)
        boxes, labels = boxes.flatten(0, 1)[order], labels.flatten()[order]
        missing = scores == MISSING
        return Detections(
            torch.where(missing[:, None], 0.0, boxes),
            torch.where(missing, 0.0, scores),
            torch.where(missing, -1, labels),
        )
