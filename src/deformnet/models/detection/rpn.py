"""Region proposal networks: boxes found by a convolution over a feature map, no pooling.

Ren et al. 2015 tells objects from background; Dai et al. 2017, section 2.3, also tells the classes
of objects apart ("category-aware"), which makes it a detector of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, clip_boxes_to_image, nms, remove_small_boxes

from deformnet.models.backbones import Backbone
from deformnet.models.detection.anchors import Convention, grid_anchors, inside_image, unit_anchors
from deformnet.models.detection.boxes import decode, encode
from deformnet.models.detection.detector import Candidates, Detector, Features, Proposals, Size, Target

_NO_OBJECT = 0  # labels inside the network; objects follow from 1
_NOT_TRAINED = -1


class RPNOutput(NamedTuple):
    """What a region proposal network answers at each anchor, A of them at each unit."""

    logits: Tensor
    """[N, H*W*A, C + 1], before the softmax; the background comes first. float32 or better."""
    deltas: Tensor
    """[N, H*W*A, 4], (dx, dy, dw, dh). float32 or better."""


class RPN(nn.Module):
    """A 3x3 convolution of 512 and ReLU, then scores and boxes of every anchor by 1x1.

    Args:
        in_channels: of the feature map.
        num_classes: C. With 1, objects are told from the background and the labels of targets
            are ignored; with more the network is class-aware.
        sizes: of the anchors, side of a square in pixels of the image.
        ratios: of the anchors, height / width.
        convention: where anchors sit, and which of them train (see `models.anchors`).
        stride: pixels of the image between units of the feature map.
        pre_nms: how many boxes of an image, the best, enter the suppression.
        post_nms: how many proposals remain of an image at most.
        nms: IoU above which the worse of two proposals is suppressed.
        batch: anchors of an image that train at a time, at most half of them on objects.
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
        for name, count in (
            ("num_classes", num_classes),
            ("pre_nms", pre_nms),
            ("post_nms", post_nms),
            ("batch", batch),
        ):
            if count < 1:
                raise ValueError(f"{name}: wanted at least 1, got {count}")
        if not 0 <= nms <= 1:
            raise ValueError(f"nms: wanted an IoU from 0 to 1, got {nms}")
        super().__init__()
        self.num_classes = num_classes
        self.convention = convention
        self.stride = stride
        self.pre_nms, self.post_nms, self.nms = pre_nms, post_nms, nms
        # Not a buffer: half-precision weights would round it.
        self.unit_anchors = unit_anchors(sizes, ratios, stride, convention)
        self.conv = nn.Conv2d(in_channels, 512, 3, padding=1)
        self.classifier = nn.Conv2d(512, len(self.unit_anchors) * (num_classes + 1), 1)
        self.regressor = nn.Conv2d(512, len(self.unit_anchors) * 4, 1)
        for layer in (self.conv, self.classifier, self.regressor):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))
        self.batch = batch
        self._matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)

    def forward(self, features: Tensor) -> RPNOutput:
        """What to answer on a feature map [N, in_channels, H, W]."""
        x = F.relu(self.conv(features), inplace=True)
        return RPNOutput(
            _by_anchor(self.classifier(x), self.num_classes + 1), _by_anchor(self.regressor(x), 4)
        )

    def anchors(self, map_size: Size, device: torch.device) -> Tensor:
        """The anchors of a map of H x W units, float32 [H*W*A, 4]."""
        return grid_anchors(self.unit_anchors, map_size, self.stride, device)

    @torch.no_grad()
    def proposals(
        self, output: RPNOutput, map_size: Size, sizes: Sequence[Size]
    ) -> list[Proposals]:
        """The best boxes of each image that do not overlap too much.

        Boxes that are not finite or have no area are dropped, so an image may have none.

        Args:
            output: for the batch.
            map_size: (H, W) of the feature map.
            sizes: of the images in the batch.
        """
        anchors = self.anchors(map_size, output.logits.device)
        found: list[Proposals] = []
        for logits, deltas, size in zip(*output, sizes, strict=True):
            own = self._own(map_size, size, logits.device)
            # The logit of "an object of any class", which does not saturate as its probability.
            score = logits[own, 1:].logsumexp(dim=1) - logits[own, _NO_OBJECT]
            boxes = clip_boxes_to_image(decode(deltas[own], anchors[own]), size)
            large = remove_small_boxes(boxes, 1e-3)
            boxes, score = boxes[large], score[large]
            boxes, score = boxes[~score.isnan()], score[~score.isnan()]
            score, order = score.sort(descending=True, stable=True)
            score, boxes = score[: self.pre_nms], boxes[order[: self.pre_nms]]
            kept = nms(boxes, score, self.nms)[: self.post_nms]
            found.append(Proposals(boxes[kept], score[kept].sigmoid()))
        return found

    def candidates(
        self, output: RPNOutput, map_size: Size, sizes: Sequence[Size]
    ) -> list[Candidates]:
        """The boxes and class probabilities of all anchors of each image, clipped to it.

        Args:
            output: for the batch.
            map_size: (H, W) of the feature map.
            sizes: of the images in the batch.
        """
        anchors = self.anchors(map_size, output.logits.device)
        found: list[Candidates] = []
        for logits, deltas, size in zip(*output, sizes, strict=True):
            own = self._own(map_size, size, logits.device)
            boxes = clip_boxes_to_image(decode(deltas[own], anchors[own]), size)
            found.append(Candidates(boxes, logits[own].softmax(dim=1)[:, 1:]))
        return found

    def losses(
        self,
        output: RPNOutput,
        map_size: Size,
        sizes: Sequence[Size],
        targets: Sequence[Target],
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Softmax loss and smooth L1 loss of anchors sampled in each image, averaged over images.

        An anchor trains on an object if their IoU is at least 0.7 or if no anchor has more of
        that object, and on the background if its IoU with every object is below 0.3. Both losses
        of an image are divided by its number of sampled anchors.

        Args:
            output: for the batch.
            map_size: (H, W) of the feature map.
            sizes: of the images in the batch.
            targets: their objects. Those that no anchor overlaps (no area, NaN, outside) do not
                train; an image without objects trains the background.
            generators: of each image, to sample its anchors; see `Detector.losses`.

        Returns:
            {"rpn_class": scalar, "rpn_box": scalar}; zero, with zero gradients, if no anchor of
            the batch trains.

        Raises:
            ValueError: if (seen on the CPU) a label is no class of a class-aware network.
        """
        anchors = self.anchors(map_size, output.logits.device)
        class_losses: list[Tensor] = []
        box_losses: list[Tensor] = []
        for logits, deltas, size, target, generator in zip(
            *output, sizes, targets, generators or [None] * len(sizes), strict=True
        ):
            labels, boxes = self._assign(anchors, map_size, size, target)
            objects = draw(labels > _NO_OBJECT, self.batch // 2, generator)
            others = draw(labels == _NO_OBJECT, self.batch - len(objects), generator)
            sampled = torch.cat((objects, others))
            count = max(len(sampled), 1)
            class_loss = F.cross_entropy(logits[sampled], labels[sampled], reduction="sum")
            wanted = encode(boxes[objects], anchors[objects])
            # The authors' smooth L1 with sigma 3.
            box_loss = F.smooth_l1_loss(deltas[objects], wanted, beta=1 / 9, reduction="sum")
            class_losses.append(class_loss / count)
            box_losses.append(box_loss / count)
        return {
            "rpn_class": torch.stack(class_losses).mean(),
            "rpn_box": torch.stack(box_losses).mean(),
        }

    def _own(self, map_size: Size, size: Size, device: torch.device) -> Tensor:
        """Which anchors are the image's and not those of the batch's padding: bool [H*W*A]."""
        units = inside_image(map_size, size, self.stride, device)
        return units.repeat_interleave(len(self.unit_anchors))

    def _assign(
        self, anchors: Tensor, map_size: Size, size: Size, target: Target
    ) -> tuple[Tensor, Tensor]:
        """What each anchor should learn.

        Returns:
            labels int64 [H*W*A]: 1 to C, or background, or not trained; and the boxes [H*W*A, 4]
            of their objects, which mean something at objects alone.
        """
        trained = self._own(map_size, size, anchors.device)
        if self.convention == "msra2017":
            height, width = size
            trained &= (anchors[:, :2] >= 0).all(dim=1)
            trained &= (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
        places = trained.nonzero().squeeze(1)
        labels = torch.full((len(anchors),), _NOT_TRAINED, device=anchors.device)
        labels[places] = _NO_OBJECT
        boxes = anchors.new_zeros(anchors.shape)
        if not len(places) or not len(target.boxes):
            return labels, boxes
        overlaps = box_iou(target.boxes.to(anchors.dtype), anchors[places])
        # An object that no anchor overlaps is equally far from all of them: they would all be its
        # best. NaN is not above 0 either.
        reached = overlaps.amax(dim=1) > 0
        if not reached.any():
            return labels, boxes
        matches = self._matcher(overlaps[reached])
        matched = matches >= 0
        labels[places[matches == Matcher.BETWEEN_THRESHOLDS]] = _NOT_TRAINED
        labels[places[matched]] = self._inner_labels(target.labels)[reached][matches[matched]]
        boxes[places[matched]] = target.boxes.to(anchors.dtype)[reached][matches[matched]]
        return labels, boxes

    def _inner_labels(self, labels: Tensor) -> Tensor:
        """Labels as the network counts them, the background first."""
        if self.num_classes == 1:
            return torch.ones_like(labels)
        if labels.device.type == "cpu":
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if wrong.numel():
                raise ValueError(
                    f"targets: wanted labels 0 to {self.num_classes - 1}, got {int(wrong[0])}"
                )
        return labels + 1


def draw(mask: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Indices of at most `count` true elements, at random."""
    indices = mask.nonzero().squeeze(1)
    order = torch.randperm(len(indices), generator=generator, device=mask.device)
    return indices[order[:count]]


class RPNDetector(Detector):
    """A backbone and a region proposal network alone.

    Class-aware, it is the paper's category-aware RPN: a detector that scores the classes of every
    anchor on conv5, where the deformable layers are. Otherwise it makes proposals for training
    another detector, as the first stage of Ren et al. 2015 does: it looks at conv4 and tells
    objects from background, which counts as one class; conv5 is not computed, and its parameters
    are frozen.

    Args:
        backbone: makes the feature maps.
        num_classes: C, classes of objects, without the background.
        class_aware: which of the two.
        sizes, ratios, convention, pre_nms, post_nms, nms, batch: as in `RPN`.
    """

    takes_proposals = False

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        class_aware: bool,
        sizes: Sequence[float] = (128, 256, 512),
        ratios: Sequence[float] = (0.5, 1, 2),
        convention: Convention = "modern",
        pre_nms: int = 6000,
        post_nms: int = 300,
        nms: float = 0.7,
        batch: int = 256,
    ) -> None:
        super().__init__(backbone, num_classes if class_aware else 1)
        self.class_aware = class_aware
        self.rpn = RPN(
            backbone.out_channels if class_aware else backbone.conv4_channels,
            self.num_classes,
            sizes=sizes,
            ratios=ratios,
            convention=convention,
            stride=backbone.stride,
            pre_nms=pre_nms,
            post_nms=post_nms,
            nms=nms,
            batch=batch,
        )
        if not class_aware:
            # Processes that train together would wait for gradients that never come.
            backbone.layer4.requires_grad_(False)
            if backbone.reduce is not None:
                backbone.reduce.requires_grad_(False)

    def features(self, images: Tensor) -> Features:
        """Feature maps of normalised images; without class-awareness conv4 stands for both."""
        if self.class_aware:
            return super().features(images)
        conv4 = self.backbone.conv4(images)
        return Features(conv4, conv4)

    def propose(self, features: Features, sizes: Sequence[Size]) -> list[Proposals]:
        """Boxes that may hold an object of any class, one entry for each image."""
        return self.rpn.proposals(self.rpn(features.last), features.size, sizes)

    def candidates(
        self, features: Features, sizes: Sequence[Size], proposals: Sequence[Tensor]
    ) -> list[Candidates]:
        """Scores and boxes of all anchors, or the proposals as one class. Ignores `proposals`."""
        if self.class_aware:
            return self.rpn.candidates(self.rpn(features.last), features.size, sizes)
        return [
            Candidates(found.boxes, found.scores[:, None])
            for found in self.propose(features, sizes)
        ]

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
            ValueError: if `proposals` are given: there is nothing to train on them.
        """
        _refuse(proposals)
        features = self.features(images)
        output = self.rpn(features.last)
        return self.rpn.losses(output, features.size, sizes, targets, generators)

    def forward(
        self, images: Tensor, sizes: Sequence[Size], proposals: Sequence[Tensor] | None = None
    ) -> list[Candidates]:
        """All candidates of normalised images [N, 3, H, W]; ValueError if proposals are given."""
        _refuse(proposals)
        return self.candidates(self.features(images), sizes, ())


def _refuse(proposals: Sequence[Tensor] | None) -> None:
    if proposals is not None:
        raise ValueError("proposals: a region proposal network takes none, got stored boxes")


def _by_anchor(maps: Tensor, values: int) -> Tensor:
    """[N, A*values, H, W] -> [N, H*W*A, values], float32 or better."""
    # Half precision would round corners of boxes to several pixels, and let scores tie.
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, values)
