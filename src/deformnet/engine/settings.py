"""Settings of `train` and `evaluate` that do not change the result; importing them is cheap."""

from dataclasses import dataclass
from typing import Literal

from deformnet._errors import require_at_least


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Machines and processes of a run."""

    devices: int | None = None
    """Processes (CPU) or GPUs on each node; None takes those that a launcher started, or 1."""
    nodes: int | None = None
    """Nodes; None takes those that a launcher (torchrun, SLURM, Ray) spans, or 1. All of them need
    the same folders."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware to compute on; auto uses GPUs if there are any."""
    workers: int | None = None
    """Processes that load images, for each computing process; None chooses."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "devices", "nodes")
        require_at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How the training loop proceeds."""

    accumulate: int = 1
    """Split each batch into this many parts that are processed in turn, to use less memory. The
    result is the same, except for trained batch norm, whose statistics are then those of a part."""
    checkpoint_every: int = 200
    """Iterations between checkpoints."""
    log_every: int = 10
    """Iterations between rows of the logs, and between checks of the offsets."""
    validate_every: int | Literal["auto"] | None = None
    """Number of iterations between validations, which keep the best network; auto validates ten
    times, None only after training."""
    patience: int | None = None
    """Number of validations without improvement after which training stops; None disables early
    stopping."""
    stop_on_runaway: bool = False
    """Stop when the offsets of a layer run away (its samples leave the feature map), instead of
    warning."""
    progress: bool = True
    """Show a progress bar or, if the output is not a terminal, print a line for each row of the
    logs."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "accumulate", "checkpoint_every", "log_every", "patience")
        if self.validate_every != "auto":
            require_at_least(self, 1, "validate_every")
