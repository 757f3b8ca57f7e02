"""Region proposal networks (RPNs).

An RPN scores anchors as object or background (Ren et al. 2015). A class-aware one also predicts the
class of the object, and so is a detector by itself (Dai et al. 2017, section 2.3).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, clip_boxes_to_image, nms, remove_small_boxes

from deformnet.models.backbones import Backbone
from deformnet.models.backbones.features import initialize
from deformnet.models.detection.anchors import Convention, grid_anchors, inside_image, unit_anchors
from deformnet.models.detection.boxes import decode, encode
from deformnet.models.detection.detector import (
    Candidates,
    Detector,
    Features,
    Proposals,
    Size,
    Target,
)
from deformnet.models.detection.suppression import MISSING, best, suppressed
from deformnet.models.network import require_labels
from deformnet.ops._arguments import positive

_BACKGROUND = 0
_IGNORED = -1
_LEAST_SIDE = 1e-3  # of a proposal


class RPNOutput(NamedTuple):
    """Predictions for each anchor, A of them at each unit of the map."""

    logits: Tensor
    """float32 or better [N, H*W*A, C + 1], the background first."""
    deltas: Tensor
    """float32 or better [N, H*W*A, 4], (dx, dy, dw, dh)."""


class RPN(nn.Module):
    """A 3x3 convolution of 512 channels, ReLU, and 1x1 convolutions for scores and boxes.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of object classes C. With 1 the network is class-agnostic and ignores
            the labels of targets; with more it is class-aware.
        sizes: Anchor sizes: side of the square of the same area, in pixels of the image.
        ratios: Aspect ratios of the anchors, height / width.
        convention: Position, rounding and training of anchors; see `models.detection.anchors`.
        stride: Stride of the feature map, in pixels of the image.
        pre_nms: Number of proposals of an image before non-maximum suppression.
        post_nms: Maximum number of proposals of an image after it.
        nms: IoU threshold of non-maximum suppression.
        batch: Number of anchors sampled from an image in training, at most half of them foreground.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 1,
        *,
        sizes: Sequence[float] = (128, 256, 512),
        ratios: Sequence[float] = (0.5, 1, 2),
        convention: Convention = "modern",
        stride: int = 16,
        pre_nms: int = 6000,
        post_nms: int = 300,
        nms: float = 0.7,
        batch: int = 256,
    ) -> None:
        if not 0 <= nms <= 1:
            raise ValueError(f"expected nms to be an IoU from 0 to 1, but got {nms}")
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = positive("num_classes", num_classes)
        self.convention, self.stride = convention, stride
        self.pre_nms = positive("pre_nms", pre_nms)
        self.post_nms = positive("post_nms", post_nms)
        self.batch = positive("batch", batch)
        self.nms = nms
        # Not a buffer: half-precision weights would round it.
        self.unit_anchors = unit_anchors(sizes, ratios, stride, convention)
        self.conv = nn.Conv2d(in_channels, 512, 3, padding=1)
        self.classifier = nn.Conv2d(512, len(self.unit_anchors) * (num_classes + 1), 1)
        self.regressor = nn.Conv2d(512, len(self.unit_anchors) * 4, 1)
        initialize(self.conv, self.classifier, self.regressor)
        self._matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)

    def forward(self, features: Tensor) -> RPNOutput:
        """Predictions on a feature map [N, in_channels, H, W]."""
        x = F.relu(self.conv(features), inplace=True)
        return RPNOutput(
            _by_anchor(self.classifier(x), self.num_classes + 1), _by_anchor(self.regressor(x), 4)
        )

    def anchors(self, map_size: Size, device: torch.device) -> Tensor:
        """Anchors of a map of H x W units, float32 [H*W*A, 4]."""
        return grid_anchors(self.unit_anchors, map_size, self.stride, device)

    @torch.no_grad()
    def proposals(
        self, output: RPNOutput, map_size: Size, sizes: Sequence[Size]
    ) -> list[Proposals]:
        """The best boxes of each image after non-maximum suppression.

        Boxes that are not finite or have no area are dropped, so an image may have no proposals.
        For the arguments see `losses`.
        """
        proposals: list[Proposals] = []
        for logits, boxes in self._predictions(output, map_size, sizes):
            # The logit of "an object of any class" does not saturate as its probability does.
            score = logits[:, 1:].logsumexp(dim=1) - logits[:, _BACKGROUND]
            large = remove_small_boxes(boxes, _LEAST_SIDE)
            boxes, score = boxes[large], score[large]
            boxes, score = boxes[~score.isnan()], score[~score.isnan()]
            score, order = score.sort(descending=True, stable=True)
            score, boxes = score[: self.pre_nms], boxes[order[: self.pre_nms]]
            kept = top_nms(boxes, score, self.nms, self.post_nms)
            proposals.append(Proposals(boxes[kept], score[kept].sigmoid()))
        return proposals

    def candidates(
        self, output: RPNOutput, map_size: Size, sizes: Sequence[Size]
    ) -> list[Candidates]:
        """Boxes and class probabilities of all anchors of each image; see `losses`."""
        return [
            Candidates(boxes, logits.softmax(dim=1)[:, 1:])
            for logits, boxes in self._predictions(output, map_size, sizes)
        ]

    def all_proposals(self, output: RPNOutput, map_size: Size, size: Size) -> Proposals:
        """`proposals` of one image without padding: `post_nms`, padded with `MISSING` ones."""
        logits, boxes = self.unpadded(output, map_size, size)
        score = logits[:, 1:].logsumexp(dim=1) - logits[:, _BACKGROUND]
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = (sides >= _LEAST_SIDE).all(dim=1) & ~score.isnan()
        boxes, score = best(boxes, torch.where(valid, score, MISSING), self.pre_nms)
        boxes, score = best(boxes, suppressed(boxes, score, self.nms), self.post_nms)
        # The probability may round to zero.
        return Proposals(boxes, torch.where(score == MISSING, MISSING, score.sigmoid()))

    def unpadded(self, output: RPNOutput, map_size: Size, size: Size) -> tuple[Tensor, Tensor]:
        """Logits and boxes, clipped to the image, of all anchors of one image without padding."""
        boxes = decode(output.deltas[0], self.anchors(map_size, output.logits.device))
        return output.logits[0], clip_boxes_to_image(boxes, size)

    def _predictions(
        self, output: RPNOutput, map_size: Size, sizes: Sequence[Size]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and boxes, clipped to the image, of the anchors of each image."""
        anchors = self.anchors(map_size, output.logits.device)
        for logits, deltas, size in zip(*output, sizes, strict=True):
            own = self._inside(map_size, size, logits.device)
            yield logits[own], clip_boxes_to_image(decode(deltas[own], anchors[own]), size)

    def losses(
        self,
        output: RPNOutput,
        map_size: Size,
        sizes: Sequence[Size],
        targets: Sequence[Target],
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy and smooth L1 loss of sampled anchors, averaged over the images.

        An anchor is foreground if its IoU with an object is at least 0.7 or the largest of any
        anchor with that object, and background if its IoU with every object is below 0.3. Both
        losses of an image are divided by its number of sampled anchors.

        Args:
            output: Predictions for the batch.
            map_size: (H, W) of the feature map.
            sizes: Image sizes inside the batch.
            targets: Ground truth of each image. Objects that no anchor overlaps (no area, NaN,
                outside the image) are ignored; an image without objects trains the background.
            generators: Generator of each image that samples its anchors; see `Detector.losses`.

        Returns:
            {"rpn_class": scalar, "rpn_box": scalar}; zero, with zero gradients, if no anchor is
            sampled.

        Raises:
            ValueError: If a label of a class-aware network is out of range (checked on the CPU).
        """
        anchors = self.anchors(map_size, output.logits.device)
        class_losses: list[Tensor] = []
        box_losses: list[Tensor] = []
        for logits, deltas, size, target, generator in zip(
            *output, sizes, targets, generators or [None] * len(sizes), strict=True
        ):
            labels, boxes = self._assign_targets(anchors, map_size, size, target)
            foreground = random_indices(labels > _BACKGROUND, self.batch // 2, generator)
            background = random_indices(
                labels == _BACKGROUND, self.batch - len(foreground), generator
            )
            sampled = torch.cat((foreground, background))
            count = max(len(sampled), 1)
            class_loss = F.cross_entropy(logits[sampled], labels[sampled], reduction="sum")
            target_deltas = encode(boxes[foreground], anchors[foreground])
            # beta = 1 / sigma^2 with the authors' sigma of 3.
            box_loss = F.smooth_l1_loss(
                deltas[foreground], target_deltas, beta=1 / 9, reduction="sum"
            )
            class_losses.append(class_loss / count)
            box_losses.append(box_loss / count)
        return {
            "rpn_class": torch.stack(class_losses).mean(),
            "rpn_box": torch.stack(box_losses).mean(),
        }

    def _inside(self, map_size: Size, size: Size, device: torch.device) -> Tensor:
        """Mask of the anchors outside the batch's padding, bool [H*W*A]."""
        units = inside_image(map_size, size, self.stride, device)
        return units.repeat_interleave(len(self.unit_anchors))

    def _assign_targets(
        self, anchors: Tensor, map_size: Size, size: Size, target: Target
    ) -> tuple[Tensor, Tensor]:
        """Labels of the anchors of an image, and the boxes [H*W*A, 4] of their matched objects.

        Labels, int64 [H*W*A], are 1 to C, background or ignored; boxes of others than foreground
        anchors mean nothing.
        """
        trained = self._inside(map_size, size, anchors.device)
        if self.convention == "msra2017":
            height, width = size
            trained &= (anchors[:, :2] >= 0).all(dim=1)
            trained &= (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
        places = trained.nonzero().squeeze(1)
        labels = torch.full((len(anchors),), _IGNORED, device=anchors.device)
        labels[places] = _BACKGROUND
        boxes = anchors.new_zeros(anchors.shape)
        if not len(places) or not len(target.boxes):
            return labels, boxes
        overlaps = box_iou(target.boxes.to(anchors.dtype), anchors[places])
        # The best anchors of an object that none overlaps would be all of them. Also false for NaN.
        reached = overlaps.amax(dim=1) > 0
        if not reached.any():
            return labels, boxes
        matches = self._matcher(overlaps[reached])
        matched = matches >= 0
        labels[places[matches == Matcher.BETWEEN_THRESHOLDS]] = _IGNORED
        labels[places[matched]] = self._inner_labels(target.labels)[reached][matches[matched]]
        boxes[places[matched]] = target.boxes.to(anchors.dtype)[reached][matches[matched]]
        return labels, boxes

    def _inner_labels(self, labels: Tensor) -> Tensor:
        """Labels with the background as class 0."""
        if self.num_classes == 1:
            return torch.ones_like(labels)
        require_labels("labels of targets", labels, self.num_classes)
        return labels + 1


def random_indices(mask: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Indices of at most `count` true elements, sampled without replacement."""
    indices = mask.nonzero().squeeze(1)
    order = torch.randperm(len(indices), generator=generator, device=mask.device)
    return indices[order[:count]]


class RPNDetector(Detector):
    """A backbone and a region proposal network.

    Class-aware, it is the paper's class-aware RPN: a detector that predicts the class of every
    anchor on conv5, where the deformable layers are. Class-agnostic, it generates proposals to
    train another detector on, as in the first stage of Ren et al. 2015: it runs on conv4 and has
    the single class "object"; conv5 is not computed and its parameters are frozen.

    Args:
        backbone: Feature extractor.
        rpn: Region proposal network, class-aware on `backbone.out_channels` and otherwise on
            `backbone.conv4_channels`.
        class_aware: Whether to predict the class of objects.

    Raises:
        ValueError: If `rpn` has other input channels, or is class-agnostic with several classes.
    """

    takes_proposals = False

    def __init__(self, backbone: Backbone, rpn: RPN, *, class_aware: bool) -> None:
        channels = backbone.out_channels if class_aware else backbone.conv4_channels
        if rpn.in_channels != channels:
            raise ValueError(
                f"expected rpn to have {channels} input channels, but got {rpn.in_channels}"
            )
        if not class_aware and rpn.num_classes > 1:
            raise ValueError(f"expected rpn to have 1 class, but got {rpn.num_classes}")
        super().__init__(backbone, rpn.num_classes)
        self.rpn, self.class_aware = rpn, class_aware
        if not class_aware:
            # Distributed processes would wait for gradients that never come.
            backbone.freeze_conv5()

    @property
    def uses_conv5(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.class_aware

    def reported_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(classes) if self.class_aware else ("object",)

    def features(self, images: Tensor) -> Features:
        """Feature maps of normalized images [N, 3, H, W]; class-agnostic, conv4 is both."""
        if self.class_aware:
            return super().features(images)
        maps = self.backbone.known(images)
        if maps is None:
            conv4 = self.backbone.conv4(images)
        else:
            conv4 = maps[:, : self.backbone.conv4_channels]
        return Features(conv4, conv4)

    def propose(self, features: Features, sizes: Sequence[Size]) -> list[Proposals]:
        """Region proposals of each image, for objects of any class."""
        return self.rpn.proposals(self.rpn(features.last), features.size, sizes)

    def candidates(
        self, features: Features, sizes: Sequence[Size], proposals: Sequence[Tensor]
    ) -> list[Candidates]:
        """Class-aware, all anchors, otherwise the network's own proposals; ignores `proposals`."""
        if self.class_aware:
            return self.rpn.candidates(self.rpn(features.last), features.size, sizes)
        return [
            Candidates(image.boxes, image.scores[:, None])
            for image in self.propose(features, sizes)
        ]

    def all_candidates(self, features: Features, size: Size) -> Candidates:
        output = self.rpn(features.last)
        if not self.class_aware:
            boxes, scores = self.rpn.all_proposals(output, features.size, size)
            return Candidates(boxes, scores[:, None])
        logits, boxes = self.rpn.unpadded(output, features.size, size)
        return Candidates(boxes, logits.softmax(dim=1)[:, 1:])

    def losses(
        self,
        images: Tensor,
        sizes: Sequence[Size],
        targets: Sequence[Target],
        proposals: Sequence[Tensor] | None = None,
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """{"rpn_class": scalar, "rpn_box": scalar}, as `RPN.losses`.

        Raises:
            ValueError: If `proposals` is given, or a label is out of range (checked on the CPU).
        """
        self._check_proposals(proposals)
        features = self.features(images)
        output = self.rpn(features.last)
        return self.rpn.losses(output, features.size, sizes, targets, generators)


def top_nms(boxes: Tensor, scores: Tensor, threshold: float, count: int) -> Tensor:
    """`nms(boxes, scores, threshold)[:count]` for boxes that are sorted by descending score.

    Whether a box is kept depends only on the boxes before it, and the time of `nms` is quadratic in
    their number. So `nms` is applied to the first boxes, and to more only if too few are kept.
    """
    first = 4 * count
    while True:
        kept = nms(boxes[:first], scores[:first], threshold)[:count]
        if len(kept) == count or first >= len(boxes):
            return kept
        first *= 4


def _by_anchor(maps: Tensor, values: int) -> Tensor:
    """[N, A*values, H, W] -> [N, H*W*A, values], float32 or better."""
    # Half precision would round box corners to several pixels and make scores tie.
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, values)
