"""The runs: networks, data, budgets, and where results are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.grid import stored

Network = Literal["deeplab", "rfcn", "deeplab-lite0"]
Variant = Literal["plain", "dilation2", "dilation4", "deformable"]
Varied = Literal["both", "warp", "size"]
"""What varies between objects; the control adds "warp" and "size" to "both"."""
NETWORKS: tuple[Network, ...] = get_args(Network)
VARIANTS: tuple[Variant, ...] = ("plain", "deformable")
CONTROL_VARIANTS: tuple[Variant, ...] = ("plain", "dilation2", "deformable")
CONTROL: tuple[Varied, ...] = ("warp", "size", "both")
LAYERS = 3
"""Number of final convolutions that are dilated or deformable."""
DILATION: Mapping[Variant, int] = {"plain": 1, "dilation2": 2, "dilation4": 4, "deformable": 1}


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
    "deeplab-lite0": Budget(
        steps=500, batch=16, lr=0.2, side=160, images=1000, test=300, offset_lr_scale=1
    ),
}
TUNING_SEED = 100
"""Seed of the images and runs used only to choose settings."""
RATES = (0.05, 0.2)
"""Learning rates that tuning compares; dilations are compared only at the first."""


class Run(NamedTuple):
    """One training run."""

    network: Network
    variant: Variant
    strength: float
    seed: int
    varied: Varied = "both"

    @property
    def name(self) -> str:
        alone = "" if self.varied == "both" else f"-{self.varied}-alone"
        return f"{self.network}-{self.variant}-strength{self.strength:g}{alone}-seed{self.seed}"


class Job(NamedTuple):
    """A run with its budget.

    Attributes:
        folder: subfolder of the output folder for its result.
    """

    run: Run
    budget: Budget
    folder: str = "runs"


def runs(
    strengths: Sequence[float],
    seeds: Sequence[int],
    networks: Sequence[Network] = ("deeplab", "rfcn"),
) -> list[Run]:
    """The runs of the claim, one seed after the other, so that the first ones are informative."""
    ends = (min(strengths), max(strengths))
    return [
        Run(network, variant, strength, seed)
        for seed in seeds
        for network in networks
        for strength in sorted(set(ends if network == "rfcn" else strengths))
        for variant in VARIANTS
    ]


def control_runs(
    strength: float, seeds: Sequence[int], networks: Sequence[Network] = ("deeplab-lite0",)
) -> list[Run]:
    """The runs of the control, one seed after the other, so that the first ones are informative."""
    return [
        Run(network, variant, strength, seed, varied)
        for seed in seeds
        for network in networks
        for varied in CONTROL
        for variant in CONTROL_VARIANTS
    ]


def tuning_jobs(
    strength: float, budgets: Mapping[Network, Budget], networks: Sequence[Network]
) -> list[Job]:
    """The settings to compare for the control, on images that the control does not use."""
    return [
        Job(
            Run(network, variant, strength, TUNING_SEED),
            replace(budgets[network], data_seed=TUNING_SEED, lr=lr),
            f"tuning/lr{lr:g}",
        )
        for network in networks
        for lr in RATES
        for variant in (DILATION if lr == RATES[0] else VARIANTS)
    ]


def stored_result(job: Job, out: Path) -> dict[str, Any] | None:
    """The stored result of a job; None if it is not finished.

    Raises:
        ValueError: if it has another budget.
    """
    return stored(result_path(job, out), "budget", asdict(job.budget))


def result_path(job: Job, out: Path) -> Path:
    return out / job.folder / f"{job.run.name}.json"
