"""Settings of `train` and `evaluate` that do not change the result; importing them is cheap."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deformnet._errors import UserError, require_at_least, require_at_most


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Machines and processes of a run."""

    devices: int | None = None
    """Number of processes (CPU) or GPUs per node; None uses the launcher's number, or 1."""
    nodes: int | None = None
    """Number of nodes; None uses the launcher's number (torchrun, SLURM, Ray), or 1. All nodes need
    access to the same folders."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware to run on; auto uses GPUs if there are any."""
    workers: int | None = None
    """Number of data loader workers per process; None selects it automatically."""
    timeout: int = 1800
    """Number of seconds to wait for a loader worker or another process before the run ends with an
    error."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "devices", "nodes", "timeout")
        require_at_least(self, 0, "workers")
        require_at_most(self, 1024, "devices", "nodes", "workers")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of the training loop."""

    accumulate: int = 1
    """Number of parts into which each batch is split to save memory (gradient accumulation). The
    result is the same, except that trained batch norm computes its statistics over one part."""
    checkpoint_activations: bool = False
    """Recompute the activations of the backbone's blocks in the backward pass instead of storing
    them, which saves memory but takes more time. The result is the same up to rounding."""
    checkpoint_every: int = 200
    """Number of iterations between checkpoints."""
    log_every: int = 10
    """Number of iterations between rows of the logs, and between checks of the offsets."""
    validate_every: int | Literal["auto"] | None = None
    """Number of iterations between validations, which keep the best network; auto validates ten
    times, None only after training."""
    patience: int | None = None
    """Number of validations without improvement after which training stops; None disables early
    stopping."""
    stop_on_runaway: bool = False
    """Stop training, instead of warning, if the offsets of a layer run away (its samples leave the
    feature map)."""
    feature_cache: str | Path | None = None
    """Folder to keep the features of a frozen backbone in (freeze 5), half-precision, so that they
    are computed once and not in every iteration; for training without scale jitter, color jitter
    and crops. Several runs may use the same folder; None computes the features."""
    progress: bool = True
    """Show a progress bar or, if the output is not a terminal, print a line for each row of the
    logs."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "accumulate", "checkpoint_every", "log_every", "patience")
        if self.validate_every != "auto":
            require_at_least(self, 1, "validate_every")


SUFFIXES = (".onnx", ".pt2")
"""File suffixes of networks exported for other programs; see `deformnet.engine.whole`."""


@dataclass(frozen=True)
class WholeOptions:
    """Options for exporting a whole network to `.onnx` or `.pt2`."""

    size: tuple[int, int] | None = None
    """Fixed height and width of the input images; None allows any size."""
    normalize: bool = True
    """Include the normalization in the network, which then takes uint8 images; otherwise, it takes
    normalized float32 images."""
    resize: bool = True
    """For DeepLab: include the upsampling of the logits to the size of the images."""
    standard: bool = False
    """Replace deformable convolution with standard operators, for runtimes without DeformConv
    (.onnx) or without deformnet (.pt2). This is slower."""
    compile: bool = False
    """Compile the network with AOTInductor for the processor of this machine (.pt2 only)."""
    opset: int = 20
    """Opset version of the ONNX file: at least 19, or 18 with `standard`."""

    def __post_init__(self) -> None:
        require_at_least(self, 18 if self.standard else 19, "opset")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"expected size to be at least 1, but got {self.size}")
