"""The runs: networks, data, budgets, and where results are stored."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.grid import stored

Network = Literal["deeplab", "rfcn"]
Variant = Literal["plain", "deformable"]
NETWORKS: tuple[Network, ...] = ("deeplab", "rfcn")
VARIANTS: tuple[Variant, ...] = ("plain", "deformable")
DEFORM_LAYERS = 3


@dataclass(frozen=True)
class Budget:
    """Training budget of a network.

    Attributes:
        steps, batch: training iterations, and images per iteration.
        lr: maximum learning rate of the one-cycle schedule.
        side: height and width of the images, in pixels.
        images, test: numbers of training and test images.
        data_seed: seed of the images.
        offset_lr_scale: learning rate multiplier of the offset layers (beta in the paper).
        weight_decay: weight decay of the weights.
        clip: maximum gradient norm.
    """

    steps: int
    batch: int
    lr: float
    side: int = 128
    images: int = 2000
    test: int = 400
    data_seed: int = 0
    offset_lr_scale: float = 0.1
    weight_decay: float = 1e-4
    clip: float = 5.0


BUDGETS: dict[Network, Budget] = {
    "deeplab": Budget(steps=1200, batch=16, lr=0.3),
    "rfcn": Budget(steps=1800, batch=8, lr=0.05),
}


class Run(NamedTuple):
    """One training run."""

    network: Network
    variant: Variant
    strength: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.variant}-strength{self.strength:g}-seed{self.seed}"


def runs(
    strengths: Sequence[float], seeds: Sequence[int], networks: Sequence[Network] = NETWORKS
) -> list[Run]:
    """All runs, in an order in which the first ones are already informative."""
    ends = (min(strengths), max(strengths))
    return [
        Run(network, variant, strength, seed)
        for seed in seeds
        for network in networks
        for strength in sorted(set(strengths if network == "deeplab" else ends))
        for variant in VARIANTS
    ]


def stored_result(run: Run, budget: Budget, out: Path) -> dict[str, Any] | None:
    """The stored result of a run; None if it is not finished.

    Raises:
        ValueError: if it has another budget.
    """
    return stored(result_path(run, out), "budget", asdict(budget))


def result_path(run: Run, out: Path) -> Path:
    return out / "runs" / f"{run.name}.json"
