"""What can be set in the benchmarks."""

from dataclasses import dataclass
from typing import Literal, get_args

from deformnet.recipes import BackboneName

Row = Literal["deeplab-cityscapes", "deeplab-voc", "class-aware-rpn", "faster-rcnn", "rfcn"]
"""The rows of Table 4."""
ROWS: tuple[Row, ...] = get_args(Row)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How it is measured."""

    backbone: BackboneName = "resnet101"
    """What makes the feature maps; the paper has resnet101."""
    scale: float = 1.0
    """Factor on the sides of the images, 0.1 to 1: below 1 it is quicker, and not the paper's."""
    rounds: int = 5
    """How often each network is timed; they take turns."""
    threads: int | None = None
    """Threads on the CPU; None takes what PyTorch does."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        # On smaller images a map of conv4 has one unit, which batch norm cannot train on.
        if not 0.1 <= self.scale <= 1:
            raise ValueError(f"scale: wanted 0.1 to 1, got {self.scale}")
        if self.rounds < 1:
            raise ValueError(f"rounds: wanted at least 1, got {self.rounds}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: wanted at least 1, got {self.threads}")
