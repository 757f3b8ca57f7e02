"""Settings of `deformnet paper`; importing them is cheap."""

from dataclasses import dataclass
from typing import Literal, get_args

from deformnet._errors import UserError, require_at_least, require_at_most
from deformnet.recipes import BackboneName

Table4Network = Literal[
    "deeplab-cityscapes", "deeplab-voc", "class-aware-rpn", "faster-rcnn", "rfcn"
]
"""Networks of Table 4."""
TABLE4_NETWORKS: tuple[Table4Network, ...] = get_args(Table4Network)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Splits to use in place of those of the row."""

    train_split: str | None = None
    """Split to train on; None uses the split of the row."""
    test_split: str | None = None
    """Split to evaluate on; None uses the split of the row."""

    def of(self, train: str, test: str) -> tuple[str, str]:
        """Return the splits to use, given those of the row."""
        return self.train_split or train, self.test_split or test


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Differences between a dry run and the row."""

    batch: int | None = None
    """Images per iteration; None uses the batch size of the row (8, or 256 for classification)."""
    scale: float = 1.0
    """Factor on the sides of the images, 0.1 to 1; below 1, iterations take less time and memory
    than those of the row."""

    def __post_init__(self) -> None:
        _require_scale(self.scale)
        require_at_least(self, 1, "batch")
        require_at_most(self, 2**16, "batch")


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """Options of `deformnet paper table4` and `training-step`."""

    backbone: BackboneName = "resnet101"
    """Backbone; resnet101 in the paper."""
    scale: float = 1.0
    """Factor on the sides of the images, 0.1 to 1; below 1, timing is quicker but does not compare
    to the paper."""
    rounds: int = 5
    """Rounds of timing; the networks take turns."""
    threads: int | None = None
    """CPU threads; None uses PyTorch's default."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to compute on."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """float32, or mixed precision with bfloat16 (autocast), as in training and evaluation."""

    def __post_init__(self) -> None:
        # On smaller images, conv4 has a single unit, on which batch norm cannot train.
        _require_scale(self.scale)
        require_at_least(self, 1, "rounds", "threads")
        require_at_most(self, 1024, "rounds", "threads")


def _require_scale(scale: float) -> None:
    if not 0.1 <= scale <= 1:
        raise UserError(f"expected scale to be between 0.1 and 1, but got {scale}")
