"""What all networks have in common: a backbone, classes, and what tools ask of any of them."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from deformnet.models.backbones import Backbone
from deformnet.ops._arguments import positive


class Network(nn.Module):
    """Abstract base class of the networks: a backbone and a head.

    Args:
        backbone: Feature extractor.
        num_classes: Number of classes; a subclass says whether the background is one of them.

    Raises:
        ValueError: If `num_classes` is less than 1.
    """

    uses_conv5 = True
    """Whether `forward` runs conv5 of the backbone, where deformable convolutions are."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = positive("num_classes", num_classes)

    @property
    def deformable_pooling(self) -> str | None:
        """Name of the deformable RoI pooling layer that class scores come from, if there is one."""
        return None

    def reported_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Names of the labels that the network predicts.

        Args:
            classes: Class names of the training data.
        """
        return tuple(classes)

    @abstractmethod
    def random_losses(self, images: Tensor) -> Callable[[], dict[str, Tensor]]:
        """A training step's forward pass on random ground truth, to be timed or profiled.

        Args:
            images: [N, 3, H, W].

        Returns:
            A function that computes the losses; the ground truth is drawn once, with torch's
            global generator.
        """


def require_labels(name: str, labels: Tensor, num_classes: int, ignored: int | None = None) -> None:
    """Check the values of labels on the CPU.

    On other devices the check would wait for the device, whose own assertion ends the program.

    Raises:
        ValueError: If a label is neither in [0, num_classes) nor `ignored`.
    """
    if labels.device.type != "cpu":
        return
    outside = (labels < 0) | (labels >= num_classes)
    if ignored is not None:
        outside &= labels != ignored
    if outside.any():
        allowed = f"0 to {num_classes - 1}" + ("" if ignored is None else f" or {ignored}")
        raise ValueError(f"expected {name} to be {allowed}, but got {int(labels[outside][0])}")
