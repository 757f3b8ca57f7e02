"""Settings of the demo."""

from dataclasses import dataclass

from deformnet.engine.settings import require_at_least


@dataclass(frozen=True)
class Demo:
    """Size of the demo.

    Attributes:
        iterations: iterations of training for each of the two segmentation networks.
        detector_iterations: iterations of training for the detector.
        images: number of synthetic training images.
        val: number of synthetic validation images.
        size: height and width of the images, in pixels.
        seed: seed of the images, the initial weights and the order of training.
    """

    iterations: int = 700
    detector_iterations: int = 400
    images: int = 2500
    val: int = 200
    size: int = 128
    seed: int = 0

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
