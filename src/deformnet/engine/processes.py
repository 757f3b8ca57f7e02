"""The processes of a run: their number, their start by Lightning Fabric, and their agreement."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

from deformnet._errors import UserError
from deformnet.engine.connections import closed_at_exit
from deformnet.engine.settings import Hardware
from deformnet.tasks.base import Processes

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Layout:
    """Numbers of processes of a run, as requested or as a launcher has set them up.

    Attributes:
        devices: processes on each node.
        nodes: machines.
        workers: loader processes of each process.
        gpu: whether the processes compute on GPUs.
    """

    devices: int
    nodes: int
    workers: int
    gpu: bool

    @classmethod
    def of(cls, hardware: Hardware) -> "Layout":
        """The layout that is requested; UserError for a GPU where there is none."""
        if hardware.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("accelerator: expected a GPU for gpu, but PyTorch finds none; use cpu")
        launched = spanned = 1
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun, Ray
            launched = int(os.environ["LOCAL_WORLD_SIZE"])
            spanned = int(os.environ["WORLD_SIZE"]) // launched
        elif "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
            spanned = int(os.environ["SLURM_NNODES"])
            launched = int(os.environ["SLURM_NTASKS"]) // spanned
        devices = launched if hardware.devices is None else hardware.devices
        # Half the cores for loading, at most 4 processes each.
        default = max(1, min(4, (os.cpu_count() or 1) // (2 * devices)))
        return cls(
            devices,
            spanned if hardware.nodes is None else hardware.nodes,
            default if hardware.workers is None else hardware.workers,
            hardware.accelerator != "cpu" and torch.cuda.is_available(),
        )

    @property
    def processes(self) -> int:
        return self.devices * self.nodes


@contextmanager
def launched(layout: Layout, precision: Precision, facts: Mapping[str, object]) -> Iterator[Fabric]:
    """The processes of a run, started or joined.

    With several devices and no launcher, Fabric starts the other processes by running the program
    again with the same arguments.

    Args:
        facts: whatever all processes must agree on, by name.
    Raises:
        UserError: if the devices do not exist, or in every process if they do not agree.
    """
    try:
        fabric = Fabric(
            accelerator="gpu" if layout.gpu else "cpu",
            devices=layout.devices,
            num_nodes=layout.nodes,
            precision=precision,
        )
    except MisconfigurationException as error:
        raise UserError(f"devices: {' '.join(str(error).split())}") from error
    with closed_at_exit():
        fabric.launch()
        _require_agreement(FabricProcesses(fabric), facts)
        yield fabric


class FabricProcesses(Processes):
    """The processes of a run."""

    def __init__(self, fabric: Fabric, workers: int = 0, progress: bool = False) -> None:
        super().__init__(fabric.device, workers, progress, fabric.global_rank, fabric.world_size)

    def gather(self, value: _T, /) -> list[_T]:
        if self.count == 1:
            return [value]
        values = [value] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def is_first_process() -> bool:
    """Whether this is the process of a run that prints and writes results."""
    return rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess] (Lightning sets it)


def _require_agreement(processes: FabricProcesses, facts: Mapping[str, object]) -> None:
    """Stops processes that were started differently before they wait for one another forever."""
    everyone = processes.gather({name: str(value) for name, value in facts.items()})
    differences = []
    for name in everyone[0]:
        ranks: dict[str, list[str]] = {}
        for rank, own in enumerate(everyone):
            ranks.setdefault(own.get(name, "unknown"), []).append(str(rank))
        if len(ranks) > 1:
            values = (f"{value} on rank {', '.join(where)}" for value, where in ranks.items())
            differences.append(f"{name}: {'; '.join(values)}")
    if differences:
        raise UserError(
            "expected all processes of this run to be started alike, but got "
            + " | ".join(differences)
        )
