"""The processes of a run: their number, their start by Lightning Fabric, and their agreement."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed import DistNetworkError, DistStoreError

from deformnet._errors import UserError
from deformnet.data.workers import PATIENCE
from deformnet.engine.connections import closed_at_exit
from deformnet.engine.interruption import Interruption, StopRequested, interruptible
from deformnet.engine.places import Places
from deformnet.engine.settings import Hardware
from deformnet.engine.starting import started
from deformnet.tasks.base import Processes

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_T = TypeVar("_T")

_log = logging.getLogger("deformnet")


@dataclass(frozen=True)
class Layout:
    """Numbers of processes of a run, as requested or as a launcher has set them up.

    Attributes:
        devices: processes on each node.
        nodes: machines.
        workers: loader processes of each process.
        gpu: whether the processes compute on GPUs.
        timeout: seconds to wait for another process.
    """

    devices: int
    nodes: int
    workers: int
    gpu: bool
    timeout: int

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
            hardware.timeout,
        )

    @property
    def processes(self) -> int:
        return self.devices * self.nodes


@contextmanager
def launched(
    layout: Layout, precision: Precision, facts: Mapping[str, object]
) -> Iterator["FabricProcesses"]:
    """The processes of a run, started or joined.

    With several devices and no launcher, the other processes are started by running the program
    again with the same arguments.

    Args:
        facts: whatever all processes must agree on, by name.
    Raises:
        UserError: if the devices do not exist, or in every process if they do not agree.
        TimeoutError: if the processes do not connect in time.
    """
    timeout = timedelta(seconds=layout.timeout)
    try:
        fabric = Fabric(
            accelerator="gpu" if layout.gpu else "cpu",
            devices=layout.devices,
            num_nodes=layout.nodes,
            precision=precision,
            strategy="auto" if layout.processes == 1 else DDPStrategy(timeout=timeout),
        )
    except MisconfigurationException as error:
        raise UserError(f"devices: {' '.join(str(error).split())}") from error
    with interruptible() as interruption, closed_at_exit(), ExitStack() as stack:
        if isinstance(fabric.strategy, DDPStrategy):
            environment = fabric.strategy.cluster_environment
            assert environment is not None
            stack.enter_context(started(environment, layout.devices, layout.nodes))
            with _meeting(environment, layout):
                fabric.launch()
        else:
            fabric.launch()
        places = Places(fabric.global_rank, fabric.world_size)
        processes = FabricProcesses(
            device=fabric.device,
            workers=layout.workers,
            rank=fabric.global_rank,
            count=fabric.world_size,
            timeout=layout.timeout,
            fabric=fabric,
            places=places,
            interruption=interruption,
        )
        stack.enter_context(places.shown())
        _require_agreement(processes, facts)
        yield processes


@contextmanager
def _meeting(environment: ClusterEnvironment, layout: Layout) -> Iterator[None]:
    """Logs that a process waits, until all processes have connected."""
    place = f"{environment.main_address}:{environment.main_port}"
    rank = environment.node_rank() * layout.devices + environment.local_rank()
    start, met = time.monotonic(), threading.Event()

    def tell() -> None:
        while not met.wait(PATIENCE):
            waited = time.monotonic() - start
            text = "rank %d: waiting for the %d processes of this run at %s for %.0f seconds"
            _log.warning(text, rank, layout.processes, place, waited)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        if "timed out" not in str(error).lower():
            raise
        raise TimeoutError(
            f"rank {rank}: expected all {layout.processes} processes of this run to connect to "
            f"{place} within {layout.timeout:g} seconds, but some did not; check that all are "
            "started and can reach that address, or set a longer --timeout"
        ) from error
    finally:
        met.set()


@dataclass(frozen=True, kw_only=True)
class FabricProcesses(Processes):
    """The processes of a run."""

    fabric: Fabric
    places: Places
    interruption: Interruption

    def gather(self, value: _T, /) -> list[_T]:
        """
        Raises:
            StopRequested: in every process, if any of them was asked to stop.
        """
        everyone = [(self.stopping(), value)] * self.count
        if self.count > 1:
            self.places.at("exchange of results")
            torch.distributed.all_gather_object(everyone, everyone[0])
        if any(stopping for stopping, _ in everyone):
            raise StopRequested
        return [value for _, value in everyone]

    def stopping(self) -> bool:
        return self.interruption.requested


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
