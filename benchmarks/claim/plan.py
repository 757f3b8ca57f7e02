"""Which networks are trained, on what, for how long; and where each one's result lies."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Network = Literal["deeplab", "rfcn"]
Variant = Literal["plain", "deformable"]
NETWORKS: tuple[Network, ...] = ("deeplab", "rfcn")
VARIANTS: tuple[Variant, ...] = ("plain", "deformable")
DEFORM_LAYERS = 3


@dataclass(frozen=True)
class Budget:
    """What every run of a network gets.

    Attributes:
        steps, batch: of training; images of a batch.
        lr: the highest of one cycle.
        side: height and width of the images, in pixels.
        images, test: how many there are to train on, and to score on.
        data_seed: of the images.
        offset_lr_scale: of layers that make offsets, the paper's beta.
        weight_decay: of weights.
        clip: largest norm of the gradient.
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
    """One training."""

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
    """All trainings, in an order in which the first ones already say something."""
    ends = (min(strengths), max(strengths))
    return [
        Run(network, variant, strength, seed)
        for seed in seeds
        for network in networks
        for strength in sorted(set(strengths if network == "deeplab" else ends))
        for variant in VARIANTS
    ]


def stored_result(run: Run, budget: Budget, out: Path) -> dict[str, Any] | None:
    """What came of a run; None if it is not finished.

    Raises:
        ValueError: if it had another budget.
    """
    path = result_path(run, out)
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    if found["budget"] != asdict(budget):
        raise ValueError(f"{path}: wanted a run of {asdict(budget)}, got {found['budget']}")
    return found


def result_path(run: Run, out: Path) -> Path:
    return out / "runs" / f"{run.name}.json"
