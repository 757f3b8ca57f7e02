"""What can be set when a row is run, without importing what runs it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where it is computed; nothing here changes the result."""

    devices: int | None = None
    """Processes (CPU) or GPUs on each machine; None is what torchrun or SLURM started, or 1."""
    nodes: int | None = None
    """Machines; None is what torchrun or SLURM spans, or 1."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute."""
    accumulate: int = 1
    """Parts in which each process works through its images of an iteration: more of them take less
    memory and more time."""
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
