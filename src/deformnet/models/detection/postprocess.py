"""Post-processing of detections: thresholds, non-maximum suppression and box averaging."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import ops

from deformnet.models.detection.detector import Candidates, Detections
from deformnet.ops._arguments import positive

PER_CLASS = 6000
"""Maximum number of candidates of a class before non-maximum suppression.

It bounds the 20,000 anchors x 80 classes of an untrained RPN; two-stage detectors have fewer.
"""


def postprocess(
    candidates: Candidates,
    *,
    score_threshold: float = 1e-3,
    nms: float = 0.3,
    max_detections: int = 300,
    soft_nms: bool = False,
    box_averaging: bool = False,
) -> Detections:
    """Detections of an image by non-maximum suppression (NMS) within each class.

    Candidates that are not finite or have no area are dropped. Ties are broken by the lower class,
    then by the earlier candidate.

    Args:
        candidates: Candidates of one image, possibly none.
        score_threshold: Minimum score, exclusive.
        nms: IoU threshold of non-maximum suppression.
        max_detections: Maximum number of detections, over all classes.
        soft_nms: Whether to multiply the score of a candidate by exp(-IoU^2 / 0.6) for each better
            one of its class, in place of suppressing it (Bodla et al. 2017, the authors'
            Gaussian). `nms` is then unused.
        box_averaging: Whether to replace each box by the mean of all candidates of its class with
            an IoU of at least 0.5, weighted by their scores (Gidaris and Komodakis 2015).

    Raises:
        ValueError: If an argument is out of range, or the shapes of the candidates disagree.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"expected score_threshold to be 0 to 1, but got {score_threshold}")
    if not 0 <= nms <= 1:
        raise ValueError(f"expected nms to be an IoU from 0 to 1, but got {nms}")
    positive("max_detections", max_detections)
    boxes, scores = candidates
    if boxes.shape not in ((len(scores), 4), (*scores.shape, 4)):
        raise ValueError(
            "expected candidates to have boxes [K, 4] or [K, C, 4] and scores [K, C], "
            f"but got {list(boxes.shape)} and {list(scores.shape)}"
        )
    empty = torch.empty(0, dtype=torch.int64, device=scores.device)
    per_class = [Detections(boxes.new_empty(0, 4), scores.new_empty(0), empty)]
    # batched_nms would shift the boxes of each class, which rounds their coordinates.
    for label in range(scores.shape[1]):
        own = boxes if boxes.ndim == 2 else boxes[:, label]
        valid = (scores[:, label] > score_threshold) & has_area(own)
        score, order = scores[valid, label].sort(descending=True, stable=True)
        score, own = score[:PER_CLASS], own[valid][order[:PER_CLASS]]
        if soft_nms:
            kept, kept_scores = _soft_nms(own, score, score_threshold, max_detections)
        else:
            kept = ops.nms(own, score, nms)[:max_detections]
            kept_scores = score[kept]
        kept_boxes = _average(own[kept], own, score) if box_averaging else own[kept]
        per_class.append(Detections(kept_boxes, kept_scores, torch.full_like(kept, label)))
    merged = Detections(*(torch.cat(parts) for parts in zip(*per_class, strict=True)))
    best = merged.scores.argsort(descending=True, stable=True)[:max_detections]
    return Detections(*(part[best] for part in merged))


def merge(parts: Sequence[Candidates]) -> Candidates:
    """Concatenate the candidates of one image from several passes of a detector.

    If any pass has class-specific boxes, so has the result.

    Raises:
        ValueError: If `parts` is empty.
    """
    if not parts:
        raise ValueError("expected parts to have candidates of at least one pass, but got none")
    boxes, scores = zip(*parts, strict=True)
    if any(own.ndim == 3 for own in boxes):
        boxes = [
            own if own.ndim == 3 else own[:, None].expand(*score.shape, 4) for own, score in parts
        ]
    return Candidates(torch.cat(boxes), torch.cat(scores))


def has_area(boxes: Tensor) -> Tensor:
    """Mask [...] of the finite boxes [..., 4] with a positive area."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(dim=-1)
    area = width * height  # may round to zero, which would make the IoU NaN
    return (width > 0) & (height > 0) & (area > 0) & area.isfinite()


def _soft_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Indices int64 [D] of the candidates of a class after Gaussian soft-NMS, and their scores."""
    scores = scores.clone()
    kept: list[Tensor] = []
    kept_scores: list[Tensor] = []
    while len(kept) < min(limit, len(scores)):
        best_score, best = scores.max(dim=0)
        if best_score <= score_threshold:
            break
        kept.append(best)
        kept_scores.append(best_score)
        overlaps = ops.box_iou(boxes[best][None], boxes)[0]
        scores *= torch.exp(-(overlaps**2) / 0.6)
        scores[best] = -1
    if not kept:
        return torch.empty(0, dtype=torch.int64, device=boxes.device), scores[:0]
    return torch.stack(kept), torch.stack(kept_scores)


def _average(kept: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
    """Mean of `boxes` [K, 4] that overlap each of `kept` [D, 4], weighted by their scores."""
    weights = scores * (ops.box_iou(kept, boxes) >= 0.5)
    return weights @ boxes / weights.sum(dim=1, keepdim=True)
