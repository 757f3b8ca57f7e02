"""Detectors that judge proposed boxes (RoIs): which of them train, towards what, and how it counts.

The numbers are those of the authors' code (Dai et al. 2017 name only some of them).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from deformnet.models.backbones import Backbone
from deformnet.models.detection.boxes import HEAD, decode, encode
from deformnet.models.detection.detector import Candidates, Detector, Features, Proposals, Size, Target
from deformnet.models.detection.rpn import RPN, draw
from deformnet.ops.roi_pool.api import Sampling

ROIS_PER_IMAGE = 128
"""RoIs of an image whose losses count (section 4.2)."""
FOREGROUND = 0.25
"""Largest part of sampled RoIs that may hold objects."""


class RoIs(NamedTuple):
    """Boxes of an image to train on, and what the network should say of them."""

    boxes: Tensor
    """float32 [S, 4]."""
    labels: Tensor
    """int64 [S]: 0 is the background, 1 to C the classes."""
    deltas: Tensor
    """float32 [S, 4]: from the box to its object, encoded with `boxes.HEAD`; 0 for background."""
    iou: Tensor
    """float32 [S]: with the object that overlaps the box most; zero if there is none."""


def assign(proposals: Tensor, target: Target) -> RoIs:
    """What each box of an image, proposed [P, 4] or an object itself, should be taken for.

    A box belongs to the object that it overlaps most if their IoU is at least 0.5, and to the
    background otherwise. Boxes that are not finite are left out, and objects without area.
    """
    sides = target.boxes[:, 2:] - target.boxes[:, :2]
    real = target.boxes.isfinite().all(dim=1) & (sides > 0).all(dim=1)
    objects, classes = target.boxes[real], target.labels[real]
    boxes = torch.cat((proposals[proposals.isfinite().all(dim=1)], objects))
    labels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    deltas = torch.zeros_like(boxes)
    if not len(objects):
        return RoIs(boxes, labels, deltas, boxes.new_zeros(len(boxes)))
    iou, nearest = box_iou(objects, boxes).max(dim=0)
    found = (iou >= 0.5).nonzero().squeeze(1)
    labels[found] = classes[nearest[found]] + 1
    deltas[found] = encode(objects[nearest[found]], boxes[found], HEAD)
    return RoIs(boxes, labels, deltas, iou)


def sample(rois: RoIs, count: int, least_iou: float, generator: Generator | None = None) -> RoIs:
    """At most `count` of the boxes, drawn at random.

    At most a quarter of `count` hold objects. The rest is background of at least `least_iou` with
    an object; where that is too little, other background fills up.
    """
    background = rois.labels == 0
    close = rois.iou >= least_iou
    chosen = draw(rois.labels > 0, int(FOREGROUND * count), generator)
    for mask in (background & close, background & ~close):
        chosen = torch.cat((chosen, draw(mask, count - len(chosen), generator)))
    return RoIs(*(values[chosen] for values in rois))


def roi_losses(
    logits: Tensor, deltas: Tensor, rois: Sequence[RoIs], count: int
) -> dict[str, Tensor]:
    """Softmax loss of the classes and smooth L1 loss of the boxes.

    In each image the `count` boxes with the largest sum of both count: where there are more, this
    is online hard example mining. Each loss is averaged over them, and then over the images; a
    box in the background has no box loss.

    Args:
        logits: [R, C + 1], the boxes of all images one after the other.
        deltas: [R, 4], or [R, C, 4] where every class has its own.
        rois: of each image.
        count: boxes of each image that count.

    Returns:
        {"class": scalar, "box": scalar}; zero, with zero gradients, if there are no boxes.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = torch.cat([image.labels for image in rois])
    wanted = torch.cat([image.deltas for image in rois]).to(dtype)
    if deltas.ndim == 3:
        own_class = (labels - 1).clamp(min=0)
        deltas = deltas[torch.arange(len(deltas), device=deltas.device), own_class]
    class_loss = F.cross_entropy(logits.to(dtype), labels, reduction="none")
    box_loss = F.smooth_l1_loss(deltas.to(dtype), wanted, reduction="none").sum(dim=1)
    box_loss = torch.where(labels > 0, box_loss, 0)

    shares = []
    for loss in (class_loss + box_loss).detach().split([len(image.labels) for image in rois]):
        hardest = loss.topk(min(count, len(loss))).indices
        share = torch.zeros_like(loss)
        share[hardest] = 1 / (len(rois) * max(len(hardest), 1))
        shares.append(share)
    share = torch.cat(shares)
    return {"class": (class_loss * share).sum(), "box": (box_loss * share).sum()}


def boxes_to_pool(boxes: Sequence[Tensor], sampling: Sampling | None) -> Tensor:
    """Boxes [r, 4] of each image as RoI pooling wants them, [R, 5] with the index of the image.

    Only "aligned" sampling takes a box by its edges. The others, and torchvision's max pooling
    (None), name the first and last pixel of a box, as the authors do.
    """
    index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
    joined = torch.cat(tuple(boxes))
    if sampling != "aligned":
        joined = joined - joined.new_tensor((0, 0, 1, 1))
    return torch.cat((index, joined), dim=1)


class RegionDetector(Detector):
    """A region proposal network on conv4, and a head that judges each proposed box. Abstract.

    Both train together. On stored proposals the head trains alone with the backbone: no gradient
    reaches `rpn` (freeze it where processes train together and would wait for one).

    Args:
        backbone: makes the feature maps.
        num_classes: C, classes of objects, without the background.
        rpn: proposes boxes.
    """

    def __init__(self, backbone: Backbone, num_classes: int, rpn: RPN) -> None:
        super().__init__(backbone, num_classes)
        self.rpn = rpn

    @abstractmethod
    def judge(self, last: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the head says of boxes on the last feature map.

        Args:
            last: [N, out_channels, H, W].
            boxes: of each image [r, 4], R together.

        Returns:
            Scores before the softmax [R, C + 1], background first, and box refinements [R, 4] or
            [R, C, 4] in units of `boxes.HEAD`.
        """

    @abstractmethod
    def choose(self, rois: RoIs, generator: Generator | None = None) -> RoIs:
        """The boxes of an image that go through the head in training."""

    def propose(self, features: Features, sizes: Sequence[Size]) -> list[Proposals]:
        return self.rpn.proposals(self.rpn(features.conv4), features.size, sizes)

    def candidates(
        self, features: Features, sizes: Sequence[Size], proposals: Sequence[Tensor]
    ) -> list[Candidates]:
        logits, deltas = self.judge(features.last, proposals)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.to(dtype).softmax(dim=1)[:, 1:]
        counts = [len(boxes) for boxes in proposals]
        return [
            Candidates(clip_boxes_to_image(decode(delta, boxes, HEAD), size), score)
            for size, boxes, delta, score in zip(
                sizes, proposals, deltas.to(dtype).split(counts), scores.split(counts), strict=True
            )
        ]

    def losses(
        self,
        images: Tensor,
        sizes: Sequence[Size],
        targets: Sequence[Target],
        proposals: Sequence[Tensor] | None = None,
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """The terms "class" and "box", and without stored proposals "rpn_class" and "rpn_box".

        Raises:
            ValueError: if an argument has not one entry for each image; if a target's shapes are
                wrong, or (seen on the CPU) a label is no class.
        """
        for name, values in (
            ("sizes", sizes),
            ("targets", targets),
            ("proposals", proposals),
            ("generators", generators),
        ):
            if values is not None and len(values) != len(images):
                raise ValueError(
                    f"{name}: wanted one for each of {len(images)} images, got {len(values)}"
                )
        for i, target in enumerate(targets):
            self._check(target, i)
        features = self.features(images)
        losses: dict[str, Tensor] = {}
        if proposals is None:
            output, size = self.rpn(features.conv4), features.size
            losses = self.rpn.losses(output, size, sizes, targets, generators)
            proposals = [found.boxes for found in self.rpn.proposals(output, size, sizes)]
        rois = [
            self.choose(assign(boxes, target), generator)
            for boxes, target, generator in zip(
                proposals, targets, generators or [None] * len(targets), strict=True
            )
        ]
        logits, deltas = self.judge(features.last, [image.boxes for image in rois])
        return losses | roi_losses(logits, deltas, rois, ROIS_PER_IMAGE)

    def _check(self, target: Target, image: int) -> None:
        boxes, labels = target
        if labels.ndim != 1 or list(boxes.shape) != [len(labels), 4]:
            raise ValueError(
                f"targets: wanted boxes [n, 4] and labels [n], got {list(boxes.shape)} and "
                f"{list(labels.shape)} in image {image}"
            )
        # Elsewhere the device would have to wait for it, and its own assertion stops the program.
        if labels.device.type == "cpu":
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if wrong.numel():
                raise ValueError(
                    f"targets: wanted labels 0 to {self.num_classes - 1}, got {int(wrong[0])} "
                    f"in image {image}"
                )
