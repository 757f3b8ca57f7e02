"""R-FCN (Dai et al. 2016) in the form of Dai et al. 2017, section 2.3."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from deformnet.models.backbones import Backbone
from deformnet.models.detection.rois import RegionDetector, RoIs, boxes_to_pool
from deformnet.models.detection.rpn import RPN
from deformnet.nn import DeformPSRoIPool2d
from deformnet.ops import deform_ps_roi_pool
from deformnet.ops.roi_pool.api import Sampling

Pool = Literal["average", "deformable"]


class RFCN(RegionDetector):
    """Maps of scores and boxes for each bin, position-sensitive pooling, and a vote of the bins.

    Nothing is left to compute for a RoI but the mean of its bins. So all RoIs go through the head
    in training, and the 128 of each image with the largest loss count (online hard example
    mining, as in the authors' code; the paper does not mention it).

    Args:
        backbone: makes the feature maps; the paper reduces them to 1024 channels.
        num_classes: C, classes of objects, without the background.
        rpn: proposes boxes.
        pool: "average", or "deformable" with offsets for every class in the maps of scores and
            common ones in the maps of boxes. Both are the same as long as all offsets are zero.
        sampling: how a bin is read; see `deform_ps_roi_pool`.
        bins: of a box in height and in width (section 4.2: 7).
        gamma: scale of the offsets.

    Raises:
        ValueError: if `num_classes` or `pool` is out of its range.
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
    ) -> None:
        if pool not in get_args(Pool):
            raise ValueError(f"pool: wanted one of {get_args(Pool)}, got {pool!r}")
        if bins < 1:
            raise ValueError(f"bins: wanted at least 1, got {bins}")
        super().__init__(backbone, num_classes, rpn)
        self.bins = bins
        self.sampling: Sampling = sampling
        channels = backbone.out_channels
        self.score_maps = nn.Conv2d(channels, (num_classes + 1) * bins * bins, 1)
        # One box for all classes. The authors make eight maps, of which four are the background's
        # and never train or report anything.
        self.box_maps = nn.Conv2d(channels, 4 * bins * bins, 1)
        for layer in (self.score_maps, self.box_maps):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))

        def pooling(offset_groups: int) -> DeformPSRoIPool2d | None:
            if pool == "average":
                return None
            return DeformPSRoIPool2d(
                channels,
                bins,
                1 / backbone.stride,
                offset_groups=offset_groups,
                gamma=gamma,
                sampling=sampling,
            )

        self.score_pool = pooling(num_classes + 1)
        self.box_pool = pooling(1)

    def judge(self, last: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rois = boxes_to_pool(boxes, self.sampling)
        return (
            self._vote(self.score_pool, self.score_maps(last), last, rois),
            self._vote(self.box_pool, self.box_maps(last), last, rois),
        )

    def choose(self, rois: RoIs, generator: Generator | None = None) -> RoIs:
        return rois

    def _vote(
        self, pool: DeformPSRoIPool2d | None, maps: Tensor, last: Tensor, rois: Tensor
    ) -> Tensor:
        """The mean over the bins of each box, [R, outputs], float32 or better."""
        if pool is not None:
            bins = pool(maps, last, rois)
        else:
            scale = 1 / self.backbone.stride
            bins = deform_ps_roi_pool(maps, rois, None, self.bins, scale, sampling=self.sampling)
        return bins.mean(dim=(2, 3), dtype=torch.promote_types(bins.dtype, torch.float32))
