"""From everything that a detector sees in an image to what is reported."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import ops

from deformnet.models.detection.detector import Candidates, Detections

_PER_CLASS = 6000
"""Candidates of a class that enter the suppression, the best: keeps 20,000 anchors x 80 classes of
an untrained network feasible. Detectors that pool have fewer."""


def select(
    candidates: Candidates,
    *,
    score_threshold: float = 1e-3,
    nms: float = 0.3,
    max_detections: int = 300,
    soft_nms: bool = False,
    box_averaging: bool = False,
) -> Detections:
    """The best candidates of each class that do not overlap too much.

    Candidates that are not finite or have no area are never selected. Of two equally good ones, the
    earlier class comes first and then the earlier candidate.

    Args:
        candidates: of one image; it may have none.
        score_threshold: only candidates that score more than this.
        nms: IoU above which the worse of two candidates of a class is suppressed.
        max_detections: of the image, over all classes.
        soft_nms: let the score of a candidate fall by exp(-IoU^2 / 0.6) for each better one of its
            class, in place of suppressing it (Bodla et al. 2017, the authors' Gaussian); `nms` is
            then not used.
        box_averaging: let every box that is left become the mean of the candidates of its class
            with an IoU of at least 0.5 to it, weighted by their scores (Gidaris and Komodakis
            2015).

    Raises:
        ValueError: if a number is out of its range, or the shapes of the candidates disagree.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold: wanted 0 to 1, got {score_threshold}")
    if not 0 <= nms <= 1:
        raise ValueError(f"nms: wanted an IoU from 0 to 1, got {nms}")
    if max_detections < 1:
        raise ValueError(f"max_detections: wanted at least 1, got {max_detections}")
    boxes, scores = candidates
    if boxes.shape not in ((len(scores), 4), (*scores.shape, 4)):
        raise ValueError(
            f"candidates: wanted boxes [K, 4] or [K, C, 4] for scores [K, C], "
            f"got {list(boxes.shape)} for {list(scores.shape)}"
        )
    found = [_empty(candidates)]
    # Class by class: suppressing all in one call would move the classes apart by adding to their
    # coordinates, which rounds them.
    for label in range(scores.shape[1]):
        own = boxes if boxes.ndim == 2 else boxes[:, label]
        chosen = (scores[:, label] > score_threshold) & _has_area(own)
        score, order = scores[chosen, label].sort(descending=True, stable=True)
        score, own = score[:_PER_CLASS], own[chosen][order[:_PER_CLASS]]
        if soft_nms:
            kept, kept_scores = _soft_nms(own, score, score_threshold, max_detections)
        else:
            kept = ops.nms(own, score, nms)[:max_detections]
            kept_scores = score[kept]
        kept_boxes = _average(own[kept], own, score) if box_averaging else own[kept]
        found.append(Detections(kept_boxes, kept_scores, torch.full_like(kept, label)))
    merged = Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    best = merged.scores.argsort(descending=True, stable=True)[:max_detections]
    return Detections(*(part[best] for part in merged))


def merge(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of one image from several runs of a detector, as of one run.

    Args:
        parts: at least one; if the classes have boxes of their own in any, they do in the result.
    """
    if not parts:
        raise ValueError("parts: wanted candidates of at least one run, got none")
    boxes = [part.boxes for part in parts]
    if any(own.ndim == 3 for own in boxes):
        boxes = [
            part.boxes
            if part.boxes.ndim == 3
            else part.boxes[:, None].expand(*part.scores.shape, 4)
            for part in parts
        ]
    return Candidates(torch.cat(boxes), torch.cat([part.scores for part in parts]))


def _empty(candidates: Candidates) -> Detections:
    boxes, scores = candidates
    labels = torch.empty(0, dtype=torch.int64, device=scores.device)
    return Detections(boxes.new_empty(0, 4), scores.new_empty(0), labels)


def _has_area(boxes: Tensor) -> Tensor:
    """bool [K]; False for boxes [K, 4] that are not finite, too."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    area = width * height  # of a sliver it may be rounded to zero, and its IoU would be NaN
    return (width > 0) & (height > 0) & (area > 0) & area.isfinite()


def _soft_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS of one class.

    Returns:
        places int64 [D] of the candidates that are left, and their lowered scores, best first.
    """
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
    """Every box of `kept` [D, 4] as the mean of those of `boxes` [K, 4] that agree with it."""
    weights = scores * (ops.box_iou(kept, boxes) >= 0.5)
    return weights @ boxes / weights.sum(dim=1, keepdim=True)
