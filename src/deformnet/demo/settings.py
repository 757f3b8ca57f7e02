"""Settings of the demo."""

from dataclasses import dataclass

from deformnet._errors import require_at_least, require_at_most


@dataclass(frozen=True)
class Demo:
    """Size of the demo."""

    iterations: int = 700
    """Number of training iterations of each segmentation network."""
    detector_iterations: int = 400
    """Number of training iterations of the detector."""
    images: int = 2500
    """Number of synthetic training images."""
    val: int = 200
    """Number of synthetic validation images."""
    size: int = 128
    """Height and width of the images, in pixels."""
    seed: int = 0
    """Random seed of the images, the initial weights and the training order."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "iterations", "detector_iterations", "images", "val")
        require_at_least(self, 64, "size")
        require_at_least(self, 0, "seed")
        require_at_most(self, 1e7, "iterations", "detector_iterations", "images", "val")
        require_at_most(self, 2**12, "size")
        require_at_most(self, 2**63 - 1, "seed")
