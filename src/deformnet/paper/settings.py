"""What can be set when a row is run, without importing what runs it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where and in which portions it is computed."""

    devices: int | None = None
    """Processes (CPU) or GPUs on each machine; None is what torchrun or SLURM started, or 1."""
    nodes: int | None = None
    """Machines; None is what torchrun or SLURM spans, or 1. All must see the same folders."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute."""
    accumulate: int = 1
    """Work through each batch in that many parts, one after the other, to need less memory. The
    result is the same, but for trained batch norm, whose statistics are then those of a part."""
    workers: int | None = None
    """Processes that load images, for each computing process; None chooses."""
    checkpoint_every: int = 200
    """Iterations between checkpoints."""
    log_every: int = 10
    """Iterations between rows of the logs."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which images, where a data set lies otherwise than the row expects."""

    train_split: str | None = None
    """Images to train on; None takes those of the row."""
    test_split: str | None = None
    """Images to score; None takes those of the row."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """How a dry run differs from the row."""

    batch: int | None = None
    """Images of a step; None takes the row's (8, or 256 in classification)."""
    scale: float = 1.0
    """Factor on the sides of the images, 0.1 to 1: below 1 it is quicker, and steps take less time
    and memory than the row's."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.scale <= 1:
            raise ValueError(f"scale: wanted 0.1 to 1, got {self.scale}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch: wanted at least 1, got {self.batch}")
