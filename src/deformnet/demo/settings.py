"""Settings of the demo."""

from dataclasses import dataclass
from pathlib import Path

from deformnet._errors import require_at_least, require_at_most


@dataclass(frozen=True)
class Demo:
    """Data and size of the demo."""

    data: Path | None = None
    """Folder of your own images with masks, boxes or both, in any layout that `deformnet data
    check` recognizes; None generates synthetic images."""
    iterations: int = 400
    """Number of training iterations of each segmentation network."""
    detector_iterations: int = 350
    """Number of training iterations of each detector."""
    seeds: int = 3
    """Number of training runs of each network, with different initial weights and order of the
    images."""
    images: int = 300
    """Number of synthetic training images."""
    val: int = 100
    """Number of synthetic validation images."""
    size: int = 384
    """Shorter side of the images, in pixels; synthetic images are square."""
    seed: int = 0
    """Random seed of the synthetic images and of the first training run of each network."""

    def __post_init__(self) -> None:
        counts = ("iterations", "detector_iterations", "seeds", "images", "val")
        require_at_least(self, 1, *counts)
        require_at_least(self, 64, "size")
        require_at_least(self, 0, "seed")
        require_at_most(self, 1e7, "iterations", "detector_iterations", "images", "val")
        require_at_most(self, 100, "seeds")
        require_at_most(self, 2**12, "size")
        require_at_most(self, 2**62, "seed")
