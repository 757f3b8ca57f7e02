"""The interface of detectors: their inputs, their outputs and the stages in between.

Boxes are [x1, y1, x2, y2] in pixels of the network's input, with edge coordinates: the first pixel
is the box [0, 0, 1, 1], and the width is x2 - x1 without "+1". A box that names its first and last
pixel, as in the authors' code, becomes one of these by adding 1 to x2 and y2; all of their "+1"
arithmetic then agrees.

Labels count the object classes from 0. Only inside a network is there a background class, which
comes first.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from deformnet.models.network import Network

Size = tuple[int, int]
"""Height and width of an image in a batch, in which all are padded to the largest."""

_RANDOM_OBJECTS = 5


class Target(NamedTuple):
    """Ground truth of an image."""

    boxes: Tensor
    """float32 [n, 4]."""
    labels: Tensor
    """int64 [n], 0 to C - 1."""


class Features(NamedTuple):
    """Feature maps of a batch, both at the backbone's stride."""

    conv4: Tensor
    """Input of the region proposal network, [N, conv4 channels, H, W]."""
    last: Tensor
    """conv5 after the channel reduction, [N, out_channels, H, W]."""

    @property
    def size(self) -> Size:
        """(H, W) of both."""
        height, width = self.last.shape[-2:]
        return height, width


class Proposals(NamedTuple):
    """Region proposals of an image, in descending order of score, detached."""

    boxes: Tensor
    """float32 [P, 4], inside the image."""
    scores: Tensor
    """float32 [P], probability of an object of any class."""


class Candidates(NamedTuple):
    """Scored boxes of an image before non-maximum suppression."""

    boxes: Tensor
    """float32 [K, 4], or [K, C, 4] with class-specific boxes."""
    scores: Tensor
    """float32 [K, C], probability of each class; the rest of 1 is the background's."""


class Detections(NamedTuple):
    """Detections of an image, in descending order of score."""

    boxes: Tensor
    """float32 [D, 4]."""
    scores: Tensor
    """float32 [D]."""
    labels: Tensor
    """int64 [D], 0 to C - 1."""


class Detector(Network):
    """Abstract base class of the detectors.

    Args:
        backbone: Feature extractor.
        num_classes: Number of object classes C, without the background.

    Raises:
        ValueError: If `num_classes` is less than 1.
    """

    takes_proposals = True
    """Whether `candidates` scores the proposals that it is given, rather than anchors."""

    def features(self, images: Tensor) -> Features:
        """Feature maps of normalized images [N, 3, H, W]."""
        conv4, conv5 = self.backbone.stages(images)
        return Features(conv4, self.backbone.reduced(conv5))

    def freeze_rpn(self) -> None:
        """Freeze the region proposal network, which training on stored proposals leaves out.

        Distributed processes would wait for its gradients.
        """
        self.get_submodule("rpn").requires_grad_(False)

    @abstractmethod
    def propose(self, features: Features, sizes: Sequence[Size]) -> list[Proposals]:
        """Region proposals of each image."""

    @abstractmethod
    def candidates(
        self, features: Features, sizes: Sequence[Size], proposals: Sequence[Tensor]
    ) -> list[Candidates]:
        """Scores and refined boxes of each image.

        Args:
            features: Feature maps of the batch.
            sizes: Image sizes, to which boxes are clipped.
            proposals: Boxes [P, 4] of each image: from `propose`, stored ones, or the boxes of an
                earlier call to be refined again.
        """

    @abstractmethod
    def all_candidates(self, features: Features, size: Size) -> Candidates:
        """Candidates of one image without padding, without data-dependent shapes.

        For exported networks: missing candidates have no area or a score of 0.
        """

    @abstractmethod
    def losses(
        self,
        images: Tensor,
        sizes: Sequence[Size],
        targets: Sequence[Target],
        proposals: Sequence[Tensor] | None = None,
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms by name, scalars averaged over the images of the batch.

        Args:
            images: Normalized images [N, 3, H, W].
            sizes: Image sizes inside the batch.
            targets: Ground truth of each image, which may be empty.
            proposals: Stored boxes [P, 4] of each image to train on in place of the network's own
                proposals; the region proposal network then has no loss.
            generators: A generator for each image, on its device, that samples anchors and RoIs, so
                that an image trains alike in any batch. None uses torch's global generator.
        """

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[Size] | None = None,
        proposals: Sequence[Tensor] | None = None,
    ) -> list[Candidates]:
        """Candidates of each image.

        Args:
            images: Normalized images [N, 3, H, W].
            sizes: Image sizes inside the batch; None for images without padding.
            proposals: Stored boxes [P, 4] of each image in place of the network's own proposals.

        Raises:
            ValueError: If a network without `takes_proposals` is given `proposals`.
        """
        self._check_proposals(proposals)
        sizes = self._sizes(images) if sizes is None else sizes
        features = self.features(images)
        if proposals is None and self.takes_proposals:
            proposals = [image.boxes for image in self.propose(features, sizes)]
        return self.candidates(features, sizes, proposals or ())

    def _check_proposals(self, proposals: Sequence[Tensor] | None) -> None:
        if proposals is not None and not self.takes_proposals:
            raise ValueError(
                "expected proposals to be None for a region proposal network, but got stored boxes"
            )

    def random_losses(self, images: Tensor) -> Callable[[], dict[str, Tensor]]:
        sizes = self._sizes(images)
        height, width = images.shape[2:]
        start = torch.rand(_RANDOM_OBJECTS, 2) * 0.5
        corners = torch.cat([start, start + 0.1 + torch.rand(_RANDOM_OBJECTS, 2) * 0.4], dim=1)
        boxes = (corners * torch.tensor([width, height] * 2)).to(images.device)
        labels = torch.arange(_RANDOM_OBJECTS, device=images.device) % self.num_classes
        targets = [Target(boxes, labels)] * len(images)
        return lambda: self.losses(images, sizes, targets)

    @staticmethod
    def _sizes(images: Tensor) -> list[Size]:
        return [(images.shape[2], images.shape[3])] * len(images)
