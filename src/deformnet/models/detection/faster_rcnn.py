"""Faster R-CNN in the form of Dai et al. 2017, section 2.3."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.ops import roi_pool

from deformnet.models.backbones import Backbone
from deformnet.models.detection.rois import ROIS_PER_IMAGE, RegionDetector, RoIs, boxes_to_pool, sample
from deformnet.models.detection.rpn import RPN
from deformnet.nn import DeformRoIPool2d
from deformnet.ops import deform_roi_pool
from deformnet.ops.roi_pool.api import Sampling

Pool = Literal["max", "average", "deformable"]


class FasterRCNN(RegionDetector):
    """RoI pooling on the last feature map, two fully connected layers, classes and boxes.

    Every class refines a box in its own way. Of each image 128 RoIs are sampled, a quarter of
    which may hold objects.

    Args:
        backbone: makes the feature maps; the paper reduces them to 256 channels.
        num_classes: C, classes of objects, without the background.
        rpn: proposes boxes.
        pool: how a bin is pooled. "max" is the authors' plain network, "average" what
            "deformable" computes as long as all offsets are zero.
        sampling: how a bin is read by "average" and "deformable"; see `deform_roi_pool`.
        bins: of a box in height and in width (section 4.2: 7).
        gamma: scale of the offsets.
        beta: factor on the learning rate of the layer that makes the offsets.

    Raises:
        ValueError: if `num_classes`, `pool` or `beta` is out of its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        rpn: RPN,
        *,
        pool: Pool,
        sampling: Sampling = "bins",
        bins: int = 7,
        gamma: float = 0.1,
        beta: float = 0.01,
    ) -> None:
        if pool not in get_args(Pool):
            raise ValueError(f"pool: wanted one of {get_args(Pool)}, got {pool!r}")
        if bins < 1:
            raise ValueError(f"bins: wanted at least 1, got {bins}")
        super().__init__(backbone, num_classes, rpn)
        self.bins = bins
        self.pool = pool
        self.sampling: Sampling = sampling
        channels = backbone.out_channels
        self.deform_pool = (
            DeformRoIPool2d(
                channels, bins, 1 / backbone.stride, gamma=gamma, beta=beta, sampling=sampling
            )
            if pool == "deformable"
            else None
        )
        self.fc1 = nn.Linear(channels * bins * bins, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.classifier = nn.Linear(1024, num_classes + 1)
        # The background, which the authors give a box as well, never trains or reports one.
        self.refiner = nn.Linear(1024, 4 * num_classes)
        for layer in (self.fc1, self.fc2, self.classifier, self.refiner):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def judge(self, last: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x = self._pooled(last, boxes).flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        return self.classifier(x), self.refiner(x).unflatten(1, (self.num_classes, 4))

    def choose(self, rois: RoIs, generator: Generator | None = None) -> RoIs:
        return sample(rois, ROIS_PER_IMAGE, least_iou=0.1, generator=generator)

    def _pooled(self, last: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """[R, out_channels, bins, bins]"""
        scale = 1 / self.backbone.stride
        if self.pool == "max":
            rois = boxes_to_pool(boxes, None)
            # torchvision wants one type, and half precision would move the boxes.
            dtype = torch.promote_types(last.dtype, rois.dtype)
            return roi_pool(last.to(dtype), rois.to(dtype), self.bins, scale).to(last.dtype)
        rois = boxes_to_pool(boxes, self.sampling)
        if self.deform_pool is not None:
            return self.deform_pool(last, rois)
        return deform_roi_pool(last, rois, None, self.bins, scale, sampling=self.sampling)
