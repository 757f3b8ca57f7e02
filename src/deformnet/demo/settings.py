"""What can be set in the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """The size of the demo.

    Attributes:
        iterations: of training, for each of the two networks.
        images: made images to train on.
        val: made images to score on.
        size: height and width of the images, in pixels.
        seed: of the images, the initial weights and the order of training.
    """

    iterations: int = 600
    images: int = 2500
    val: int = 300
    size: int = 160
    seed: int = 0
