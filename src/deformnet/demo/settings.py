"""What can be set in the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """The size of the demo.

    Attributes:
        iterations: of training, for each of the two networks that segment.
        detector_iterations: of training, for the detector.
        images: made images to train on.
        val: made images to score on.
        size: height and width of the images, in pixels.
        seed: of the images, the initial weights and the order of training.
    """

    iterations: int = 700
    detector_iterations: int = 400
    images: int = 2500
    val: int = 200
    size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("iterations", 1),
            ("detector_iterations", 1),
            ("images", 1),
            ("val", 1),
            ("size", 64),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed: wanted at least 0, got {self.seed}")
