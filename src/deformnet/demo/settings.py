"""Settings of the demo."""

from dataclasses import dataclass

from deformnet.engine.settings import require_at_least


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
        require_at_least(
            1,
            iterations=self.iterations,
            detector_iterations=self.detector_iterations,
            images=self.images,
            val=self.val,
        )
        require_at_least(64, size=self.size)
        require_at_least(0, seed=self.seed)
