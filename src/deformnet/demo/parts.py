"""The objects whose parts the demo looks at, and where their bins have moved (Figure 7)."""

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_iou

from deformnet.analysis import MovedBins, moved_bins
from deformnet.data.transforms import detection_transforms
from deformnet.data.voc import VOCDetection
from deformnet.inference import DetectionPredictor

_RIGHT = 0.5  # IoU with an object of its class from which a detection counts as right


@dataclass(frozen=True)
class Parts:
    """A detection with its bins.

    Attributes:
        image: uint8 [3, H, W].
        what: its class and score.
        box: [4], in pixels of the image.
        plain, moved: its bins [k, k, 4], before and after they are moved.
    """

    image: Tensor
    what: str
    box: Tensor
    plain: Tensor
    moved: Tensor


def find_parts(predictor: DetectionPredictor, images: VOCDetection, count: int) -> list[Parts]:
    """The best detection of each of the first images in which it is right; or else of others.

    Args:
        predictor: of an R-FCN with deformable pooling.
        images: without transforms, of the size that the network was trained on.
        count: how many; fewer are returned if fewer images have a detection.
    """
    right: list[Parts] = []
    others: list[Parts] = []
    for index in range(len(images)):
        image, objects = images[index]
        found = predictor(image)
        if not len(found.boxes):
            continue
        box, label = found.boxes[0], int(found.labels[0])
        bins = _bins(predictor, images, index, box)
        parts = Parts(
            image.as_subclass(Tensor),
            f"{images.classes[label]} {float(found.scores[0]):.2f}",
            box,
            bins.plain[0],
            bins.moved[0, label + 1],  # those of the background come first
        )
        same = objects.boxes.as_subclass(Tensor)[objects.labels == label]
        hit = len(same) > 0 and float(box_iou(box[None], same).max()) > _RIGHT
        (right if hit else others).append(parts)
        if len(right) == count:
            break
    return [*right, *others][:count]


def _bins(
    predictor: DetectionPredictor, images: VOCDetection, index: int, box: Tensor
) -> MovedBins:
    """The bins of the scores' pooling for one box of an image."""
    image, objects = images[index]
    height, width = image.shape[1:]
    prepare = detection_transforms(short_side=min(height, width), max_side=None, flip=False)
    batch = prepare(image, objects)[0][None].to(predictor.device)
    rois = [box[None].to(predictor.device)]
    found = moved_bins(predictor.model, "score_pool", batch, [(height, width)], rois)
    return MovedBins(*(bins.cpu() for bins in found))
