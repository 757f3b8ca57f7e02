"""R-FCN (Dai et al. 2016) as in Dai et al. 2017, section 2.3."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from deformnet.models.backbones import Backbone
from deformnet.models.backbones.features import initialize
from deformnet.models.detection.rois import RegionDetector, RoIs, format_rois
from deformnet.models.detection.rpn import RPN
from deformnet.nn import DeformPSRoIPool2d
from deformnet.ops import deform_ps_roi_pool
from deformnet.ops._arguments import one_of
from deformnet.ops.roi_pool.checks import Sampling

Pool = Literal["average", "deformable"]


class RFCN(RegionDetector):
    """Position-sensitive score and box maps, and an average over the bins of each RoI.

    The head of a RoI has no parameters, so all RoIs of an image go through it in training, and the
    128 with the largest loss are used (online hard example mining, as in the authors' code; the
    paper does not mention it).

    Args:
        backbone: Feature extractor; the paper reduces its output to 1024 channels.
        num_classes, rpn, sampling, bins: See `RegionDetector`.
        pool: "deformable", with class-aware offsets in the score maps and class-agnostic ones in
            the box maps, or "average", which equals it with zero offsets.
        gamma: Scale of the offsets.

    Raises:
        ValueError: If `num_classes`, `pool` or `bins` is out of range.
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
        one_of("pool", pool, get_args(Pool))
        super().__init__(backbone, num_classes, rpn, sampling, bins)
        channels = backbone.out_channels
        self.score_maps = nn.Conv2d(channels, (num_classes + 1) * bins * bins, 1)
        # Class-agnostic boxes. The authors have eight maps, four of them of the background, which
        # are neither trained nor reported.
        self.box_maps = nn.Conv2d(channels, 4 * bins * bins, 1)
        initialize(self.score_maps, self.box_maps)

        self.score_pool = self.box_pool = None
        if pool == "deformable":
            pooling = partial(
                DeformPSRoIPool2d,
                channels,
                bins,
                1 / backbone.stride,
                gamma=gamma,
                sampling=sampling,
            )
            self.score_pool = pooling(offset_groups=num_classes + 1)
            self.box_pool = pooling(offset_groups=1)

    @property
    def deformable_pooling(self) -> str | None:
        return None if self.score_pool is None else "score_pool"

    def box_head(self, last: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rois = format_rois(boxes, self.sampling)
        return (
            self._vote(self.score_pool, self.score_maps(last), last, rois),
            self._vote(self.box_pool, self.box_maps(last), last, rois),
        )

    def sample_rois(self, rois: RoIs, generator: Generator | None = None) -> RoIs:
        return rois

    def _vote(
        self, pool: DeformPSRoIPool2d | None, maps: Tensor, last: Tensor, rois: Tensor
    ) -> Tensor:
        """Mean over the bins of each RoI, [R, outputs], float32 or better."""
        if pool is not None:
            bins = pool(maps, last, rois)
        else:
            scale = 1 / self.backbone.stride
            bins = deform_ps_roi_pool(maps, rois, None, self.bins, scale, sampling=self.sampling)
        return bins.mean(dim=(2, 3), dtype=torch.promote_types(bins.dtype, torch.float32))
