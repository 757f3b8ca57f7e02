"""The objects whose parts to look at, and where their bins have moved (Figure 7)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from deformnet.analysis import moved_bins
from deformnet.data.boxes import BoxAnnotations
from deformnet.inference import DetectionPredictor
from deformnet.models.detection.faster_rcnn import FasterRCNN
from deformnet.models.detection.rfcn import RFCN
from deformnet.visualization import DetectionBins

_RIGHT = 0.5  # IoU with an object of its class from which a detection counts as right


def pooling_layer(model: nn.Module) -> str | None:
    """The name of a detector's deformable pooling that its classes are scored by; None if it has
    none."""
    if isinstance(model, RFCN) and model.score_pool is not None:
        return "score_pool"
    if isinstance(model, FasterRCNN) and model.deform_pool is not None:
        return "deform_pool"
    return None


def find_parts(
    predictor: DetectionPredictor,
    images: Iterable[tuple[Tensor, BoxAnnotations]],
    count: int,
) -> list[DetectionBins]:
    """The best detection of each of the first images in which it is right; or else of others.

    Args:
        predictor: of a detector with deformable pooling.
        images: uint8 [3, H, W] with their objects, of any size; no more of them are taken than
            needed.
        count: how many; fewer are returned if fewer images have a detection.
    Raises:
        ValueError: if the detector has no deformable pooling.
    """
    layer = pooling_layer(predictor.model)
    if layer is None:
        raise ValueError(
            f"{type(predictor.model).__name__}: wanted deformable pooling, it has none"
        )
    right: list[DetectionBins] = []
    others: list[DetectionBins] = []
    for image, objects in images:
        found = predictor(image)
        if not len(found.boxes):
            continue
        box, label = found.boxes[0], int(found.labels[0])
        same = objects.boxes.as_subclass(Tensor)[objects.labels == label]
        hit = len(same) > 0 and float(box_iou(box[None], same).max()) > _RIGHT
        what = f"{predictor.classes[label]} {float(found.scores[0]):.2f}{'' if hit else ' (wrong)'}"
        plain, moved = _bins(predictor, layer, image, box, label)
        parts = DetectionBins(image.as_subclass(Tensor), what, box, plain, moved)
        (right if hit else others).append(parts)
        if len(right) == count:
            break
    return [*right, *others][:count]


def _bins(
    predictor: DetectionPredictor, layer: str, image: Tensor, box: Tensor, label: int
) -> tuple[Tensor, Tensor]:
    """The bins [ph, pw, 4] of one box of an image, in its pixels, at rest and moved."""
    prepared = predictor.prepare(image)
    y, x = prepared.scale
    scale = torch.tensor([x, y, x, y])  # of edges, which need no shift by half a pixel
    rois = [(box * scale)[None].to(predictor.device)]
    found = moved_bins(predictor.model, layer, prepared.input, [prepared.size], rois)
    # Those of the background come first.
    own = found.of_groups(torch.tensor([label + 1]))
    return found.plain[0].cpu() / scale, own[0].cpu() / scale
