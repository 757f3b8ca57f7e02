"""Two-stage detectors: matching, sampling and losses of the regions of interest (RoIs).

The constants are those of the authors' code (Dai et al. 2017 give only some of them).
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
from deformnet.models.detection.detector import (
    Candidates,
    Detector,
    Features,
    Proposals,
    Size,
    Target,
)
from deformnet.models.detection.rpn import RPN, random_indices
from deformnet.models.network import require_labels
from deformnet.ops._arguments import positive
from deformnet.ops.roi_pool.checks import Sampling

ROIS_PER_IMAGE = 128
"""Number of RoIs of an image that enter the loss (section 4.2)."""
FOREGROUND_FRACTION = 0.25
"""Maximum fraction of foreground among sampled RoIs."""
_FOREGROUND_IOU = 0.5


class RoIs(NamedTuple):
    """RoIs of an image with their training targets."""

    boxes: Tensor
    """float32 [S, 4]."""
    labels: Tensor
    """int64 [S]: 0 for background, 1 to C for the classes."""
    deltas: Tensor
    """float32 [S, 4]: regression targets, encoded with `boxes.HEAD`; 0 for background."""
    iou: Tensor
    """float32 [S]: largest IoU with an object; 0 without objects."""


def assign_targets(proposals: Tensor, target: Target) -> RoIs:
    """Match the proposals [P, 4] of an image, and its ground-truth boxes, to the ground truth.

    A box is matched to the object with the largest IoU if that is at least 0.5, and to the
    background otherwise. Non-finite boxes and objects without area are dropped.
    """
    sides = target.boxes[:, 2:] - target.boxes[:, :2]
    valid = target.boxes.isfinite().all(dim=1) & (sides > 0).all(dim=1)
    objects, classes = target.boxes[valid], target.labels[valid]
    boxes = torch.cat((proposals[proposals.isfinite().all(dim=1)], objects))
    labels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    deltas = torch.zeros_like(boxes)
    if not len(objects):
        return RoIs(boxes, labels, deltas, boxes.new_zeros(len(boxes)))
    iou, matches = box_iou(objects, boxes).max(dim=0)
    foreground = (iou >= _FOREGROUND_IOU).nonzero().squeeze(1)
    labels[foreground] = classes[matches[foreground]] + 1
    deltas[foreground] = encode(objects[matches[foreground]], boxes[foreground], HEAD)
    return RoIs(boxes, labels, deltas, iou)


def subsample(rois: RoIs, count: int, min_iou: float, generator: Generator | None = None) -> RoIs:
    """Sample at most `count` RoIs at random.

    At most a quarter of `count` is foreground. The rest is background with an IoU of at least
    `min_iou` with an object, and other background if there is too little of it.
    """
    background = rois.labels == 0
    hard = rois.iou >= min_iou
    indices = random_indices(rois.labels > 0, int(FOREGROUND_FRACTION * count), generator)
    for mask in (background & hard, background & ~hard):
        indices = torch.cat((indices, random_indices(mask, count - len(indices), generator)))
    return RoIs(*(values[indices] for values in rois))


def roi_losses(
    logits: Tensor, deltas: Tensor, rois: Sequence[RoIs], count: int
) -> dict[str, Tensor]:
    """Cross-entropy loss of the classes and smooth L1 loss of the boxes.

    Only the `count` RoIs of each image with the largest sum of both losses are used: online hard
    example mining where there are more. Each loss is averaged over these RoIs and then over the
    images; background RoIs have no box loss.

    Args:
        logits: [R, C + 1], the RoIs of all images concatenated.
        deltas: [R, 4], or [R, C, 4] with class-specific boxes.
        rois: RoIs of each image.
        count: Number of RoIs of each image.

    Returns:
        {"class": scalar, "box": scalar}; zero, with zero gradients, if there are no RoIs.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = torch.cat([image.labels for image in rois])
    target_deltas = torch.cat([image.deltas for image in rois]).to(dtype)
    if deltas.ndim == 3:
        classes = (labels - 1).clamp(min=0)
        deltas = deltas[torch.arange(len(deltas), device=deltas.device), classes]
    class_loss = F.cross_entropy(logits.to(dtype), labels, reduction="none")
    box_loss = F.smooth_l1_loss(deltas.to(dtype), target_deltas, reduction="none").sum(dim=1)
    box_loss = torch.where(labels > 0, box_loss, 0)

    weights = []
    for loss in (class_loss + box_loss).detach().split([len(image.labels) for image in rois]):
        hardest = loss.topk(min(count, len(loss))).indices
        weight = torch.zeros_like(loss)
        weight[hardest] = 1 / (len(rois) * max(len(hardest), 1))
        weights.append(weight)
    weight = torch.cat(weights)
    return {"class": (class_loss * weight).sum(), "box": (box_loss * weight).sum()}


def format_rois(boxes: Sequence[Tensor], sampling: Sampling | None) -> Tensor:
    """Boxes [r, 4] of each image as RoI pooling takes them, [R, 5] with the batch index.

    Only "aligned" sampling uses edge coordinates. The other rules, and torchvision's max pooling
    (None), take the first and last pixel of a box, as the authors do.
    """
    index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
    joined = torch.cat(tuple(boxes))
    if sampling != "aligned":
        joined = joined - joined.new_tensor((0, 0, 1, 1))
    return torch.cat((index, joined), dim=1)


class RegionDetector(Detector):
    """Abstract base class of the two-stage detectors: an RPN on conv4 and a box head.

    Both train jointly. On stored proposals only the backbone and the box head train: `rpn` gets no
    gradient (see `freeze_rpn`).

    Args:
        backbone: Feature extractor.
        num_classes: Number of object classes C, without the background.
        rpn: Class-agnostic region proposal network.
        sampling: Sampling rule of RoI pooling; see `deform_roi_pool`.
        bins: Bins along each side of a RoI (section 4.2: 7).

    Raises:
        ValueError: If `num_classes` or `bins` is out of range.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, rpn: RPN, sampling: Sampling, bins: int
    ) -> None:
        super().__init__(backbone, num_classes)
        self.rpn = rpn
        self.sampling: Sampling = sampling
        self.bins = positive("bins", bins)

    @abstractmethod
    def box_head(self, last: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of RoIs.

        Args:
            last: Feature map [N, out_channels, H, W].
            boxes: RoIs [r, 4] of each image, R in total.

        Returns:
            Logits [R, C + 1], the background first, and deltas [R, 4] or [R, C, 4] in units of
            `boxes.HEAD`.
        """

    @abstractmethod
    def sample_rois(self, rois: RoIs, generator: Generator | None = None) -> RoIs:
        """The RoIs of an image that go through the box head in training."""

    def propose(self, features: Features, sizes: Sequence[Size]) -> list[Proposals]:
        return self.rpn.proposals(self.rpn(features.conv4), features.size, sizes)

    def candidates(
        self, features: Features, sizes: Sequence[Size], proposals: Sequence[Tensor]
    ) -> list[Candidates]:
        logits, deltas = self.box_head(features.last, proposals)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.to(dtype).softmax(dim=1)[:, 1:]
        counts = [len(boxes) for boxes in proposals]
        return [
            Candidates(clip_boxes_to_image(decode(delta, boxes, HEAD), size), score)
            for size, boxes, delta, score in zip(
                sizes, proposals, deltas.to(dtype).split(counts), scores.split(counts), strict=True
            )
        ]

    def all_candidates(self, features: Features, size: Size) -> Candidates:
        boxes, scores = self.rpn.all_proposals(self.rpn(features.conv4), features.size, size)
        found = self.candidates(features, [size], [boxes])[0]
        return Candidates(found.boxes, torch.where((scores >= 0)[:, None], found.scores, 0.0))

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
            ValueError: If an argument does not have one entry for each image, if a target has
                wrong shapes, or a label is out of range (checked on the CPU).
        """
        inputs = {"sizes": sizes, "targets": targets, "proposals": proposals}
        for name, values in (inputs | {"generators": generators}).items():
            if values is not None and len(values) != len(images):
                raise ValueError(
                    f"expected {name} to have one entry for each of {len(images)} images, "
                    f"but got {len(values)}"
                )
        self._check_targets(targets)
        features = self.features(images)
        losses: dict[str, Tensor] = {}
        if proposals is None:
            output, size = self.rpn(features.conv4), features.size
            losses = self.rpn.losses(output, size, sizes, targets, generators)
            proposals = [image.boxes for image in self.rpn.proposals(output, size, sizes)]
        rois = [
            self.sample_rois(assign_targets(boxes, target), generator)
            for boxes, target, generator in zip(
                proposals, targets, generators or [None] * len(targets), strict=True
            )
        ]
        logits, deltas = self.box_head(features.last, [image.boxes for image in rois])
        return losses | roi_losses(logits, deltas, rois, ROIS_PER_IMAGE)

    def _check_targets(self, targets: Sequence[Target]) -> None:
        for i, (boxes, labels) in enumerate(targets):
            if labels.ndim != 1 or list(boxes.shape) != [len(labels), 4]:
                raise ValueError(
                    f"expected targets[{i}] to have boxes [n, 4] and labels [n], "
                    f"but got {list(boxes.shape)} and {list(labels.shape)}"
                )
            require_labels(f"labels of targets[{i}]", labels, self.num_classes)
