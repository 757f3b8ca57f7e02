"""Faster R-CNN as in Dai et al. 2017, section 2.3."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.ops import roi_pool

from deformnet.models.backbones import Backbone
from deformnet.models.backbones.features import initialize
from deformnet.models.detection.rois import (
    ROIS_PER_IMAGE,
    RegionDetector,
    RoIs,
    format_rois,
    subsample,
)
from deformnet.models.detection.rpn import RPN
from deformnet.nn import DeformRoIPool2d
from deformnet.ops import deform_roi_pool
from deformnet.ops._arguments import one_of
from deformnet.ops.roi_pool.checks import Sampling

Pool = Literal["max", "average", "deformable"]


class FasterRCNN(RegionDetector):
    """RoI pooling on the last feature map and two fully connected layers.

    Box regression is class-specific. 128 RoIs of each image are sampled in training, at most a
    quarter of them foreground.

    Args:
        backbone: Feature extractor; the paper reduces its output to 256 channels.
        num_classes, rpn, bins: See `RegionDetector`.
        pool: RoI pooling: "max" as in the authors' baseline, "deformable", or "average", which
            equals "deformable" with zero offsets.
        sampling: Sampling rule of "average" and "deformable"; see `deform_roi_pool`.
        gamma: Scale of the offsets.
        beta: Learning rate factor of the offset layer.

    Raises:
        ValueError: If `num_classes`, `pool`, `bins` or `beta` is out of range.
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
        one_of("pool", pool, get_args(Pool))
        super().__init__(backbone, num_classes, rpn, sampling, bins)
        self.pool = pool
        self.deform_pool: DeformRoIPool2d | None = None
        channels = backbone.out_channels
        if pool == "deformable":
            self.deform_pool = DeformRoIPool2d(
                channels, bins, 1 / backbone.stride, gamma=gamma, beta=beta, sampling=sampling
            )
        self.fc1 = nn.Linear(channels * bins * bins, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.classifier = nn.Linear(1024, num_classes + 1)
        # The authors also give the background a box, which is neither trained nor reported.
        self.refiner = nn.Linear(1024, 4 * num_classes)
        initialize(self.fc1, self.fc2, self.classifier, self.refiner)

    @property
    def deformable_pooling(self) -> str | None:
        return None if self.deform_pool is None else "deform_pool"

    def box_head(self, last: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x = self._pooled(last, boxes).flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        return self.classifier(x), self.refiner(x).unflatten(1, (self.num_classes, 4))

    def sample_rois(self, rois: RoIs, generator: Generator | None = None) -> RoIs:
        return subsample(rois, ROIS_PER_IMAGE, min_iou=0.1, generator=generator)

    def _pooled(self, last: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """[R, out_channels, bins, bins]"""
        scale = 1 / self.backbone.stride
        if self.pool == "max":
            rois = format_rois(boxes, None)
            # torchvision takes a single dtype, and half precision would shift the boxes.
            dtype = torch.promote_types(last.dtype, rois.dtype)
            return roi_pool(last.to(dtype), rois.to(dtype), self.bins, scale).to(last.dtype)
        rois = format_rois(boxes, self.sampling)
        if self.deform_pool is not None:
            return self.deform_pool(last, rois)
        return deform_roi_pool(last, rois, None, self.bins, scale, sampling=self.sampling)
