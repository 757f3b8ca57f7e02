"""What the detectors have in common: what they take, what they give, and in which steps.

Boxes are [x1, y1, x2, y2] in pixels of the network's input, x to the right and y down, and say
where the edges are: the first pixel is the box [0, 0, 1, 1]. So width is x2 - x1, with no "+1"; a
box that names its first and last pixel, as in the authors' code, becomes one of these by adding 1
to x2 and y2, and all of their "+1" arithmetic then agrees with the plain one.

Labels count the classes of objects from 0. Only inside a network is there a background, and there
it comes first.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Generator, Tensor, nn

from deformnet.models.backbones import Backbone

Size = tuple[int, int]
"""Height and width of an image inside a batch, where all are extended to the largest."""


class Target(NamedTuple):
    """The objects of an image to learn from."""

    boxes: Tensor
    """float32 [n, 4]."""
    labels: Tensor
    """int64 [n], 0 to C - 1."""


class Features(NamedTuple):
    """Feature maps of a batch, both at the backbone's stride."""

    conv4: Tensor
    """What the region proposal network looks at, [N, conv4 channels, H, W]."""
    last: Tensor
    """conv5 after the reduction, [N, out_channels, H, W]."""

    @property
    def size(self) -> Size:
        """(H, W) of both."""
        height, width = self.last.shape[-2:]
        return height, width


class Proposals(NamedTuple):
    """Boxes of an image that may hold an object, best first; no gradient goes to them."""

    boxes: Tensor
    """float32 [P, 4], inside the image."""
    scores: Tensor
    """float32 [P]: probability of an object of any class."""


class Candidates(NamedTuple):
    """Everything that a detector sees in an image, before any suppression."""

    boxes: Tensor
    """float32 [K, 4], or [K, C, 4] where every class has its own."""
    scores: Tensor
    """float32 [K, C]: probability of each class; what is missing to 1 is background."""


class Detections(NamedTuple):
    """What is reported of an image, best first."""

    boxes: Tensor
    """float32 [D, 4]."""
    scores: Tensor
    """float32 [D]."""
    labels: Tensor
    """int64 [D], 0 to C - 1."""


class Detector(nn.Module):
    """A backbone and what finds boxes on its feature maps. Abstract.

    Args:
        backbone: makes the feature maps.
        num_classes: C, classes of objects, without the background.
    """

    takes_proposals = True
    """Whether boxes can be given from outside (a class-aware RPN has anchors alone)."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: wanted at least 1, got {num_classes}")
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes

    def features(self, images: Tensor) -> Features:
        """Feature maps of normalised images [N, 3, H, W]."""
        conv4, conv5 = self.backbone.stages(images)
        return Features(conv4, self.backbone.reduced(conv5))

    @abstractmethod
    def propose(self, features: Features, sizes: Sequence[Size]) -> list[Proposals]:
        """Boxes that may hold an object, one entry for each image."""

    @abstractmethod
    def candidates(
        self, features: Features, sizes: Sequence[Size], proposals: Sequence[Tensor]
    ) -> list[Candidates]:
        """Scores and refined boxes, one entry for each image.

        Args:
            features: of the batch.
            sizes: of its images; boxes are clipped to them.
            proposals: for each image boxes [P, 4]: those of `propose`, stored ones, or the boxes
                of an earlier call, which this one refines.
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
        """The terms of the loss by name, each a scalar, averaged over the images of the batch.

        Args:
            images: normalised, [N, 3, H, W].
            sizes: of the images inside it.
            targets: their objects; an image may have none.
            proposals: for each image stored boxes [P, 4] to train on in place of the network's own;
                the region proposal network is then left alone.
            generators: for each image, on its device: draws the anchors and RoIs that train. So an
                image trains alike in whichever batch it is. None takes torch's global generator.
        """

    def forward(
        self, images: Tensor, sizes: Sequence[Size], proposals: Sequence[Tensor] | None = None
    ) -> list[Candidates]:
        """All candidates of normalised images [N, 3, H, W], from own or stored proposals."""
        features = self.features(images)
        if proposals is None:
            proposals = [found.boxes for found in self.propose(features, sizes)]
        return self.candidates(features, sizes, proposals)
