"""Detections whose bins are shown (Dai et al. 2017, Figure 7)."""

from collections.abc import Iterable

from torch import Tensor
from torchvision.ops import box_iou

from deformnet.tasks.annotations import Annotation
from deformnet.tasks.predictor import Predictor
from deformnet.visualization import DetectionBins

_CORRECT = 0.5  # IoU with an object of its class above which a detection is correct


def find_bins(
    predictor: Predictor, images: Iterable[tuple[Tensor, Annotation]], count: int
) -> list[DetectionBins]:
    """Return the best detection of the first images in which it is correct, else of others.

    Args:
        predictor: predictor of a detector with deformable RoI pooling.
        images: uint8 [3, H, W] with their objects; no more of them are read than needed.
        count: maximum number of detections.
    """
    correct: list[DetectionBins] = []
    wrong: list[DetectionBins] = []
    for image, objects in images:
        inference = predictor.infer(predictor.prepare(image), (image.shape[1], image.shape[2]))
        best = inference.annotation.best(1)
        bins = inference.bins(best)
        if bins is None or not len(best.boxes):
            continue
        same = objects.boxes[[name == best.names[0] for name in objects.names]]
        hit = len(same) > 0 and float(box_iou(best.boxes, same).max()) > _CORRECT
        caption = best.captions()[0] + ("" if hit else " (wrong)")
        found = DetectionBins(image, caption, best.boxes[0], bins.regular[0], bins.moved[0])
        (correct if hit else wrong).append(found)
        if len(correct) == count:
            break
    return [*correct, *wrong][:count]
