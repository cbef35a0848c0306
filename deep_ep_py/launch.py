"""From whatever started this program to the arguments of a buffer: torchrun, mpirun or srun, or plain python."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from .communicator import thread_world
from .errors import EPArgumentError, EPBackendUnavailableError

__all__ = ["Launched", "init_from_env"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# By launcher: the rank, and the number of ranks where the launcher tells it.
_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("PMIX_RANK", ""))
_MPI_LOCAL = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


@dataclass(frozen=True, eq=False)
class Launched:
    """The world that :func:`init_from_env` found; a context manager that closes it.

    Attributes:
        launcher: who started the ranks.
        group: what to build buffers over, where it is no MPI world: a torch process group, or, for a single rank, a
            communicator of this library.
        comm: ``MPI.COMM_WORLD``, under an MPI launcher; else None.
        rank, world_size: of this process, among all.
        local_rank: among the processes of this host.
    """

    launcher: Literal["torchrun", "mpi", "single"]
    group: Any
    comm: Any
    rank: int
    world_size: int
    local_rank: int
    _made_here: list[Any] = field(default_factory=list, repr=False)  # emptied by close()

    @property
    def arguments(self) -> dict[str, Any]:
        """What every buffer takes: ``Buffer(**launched.arguments)``."""
        return {"group": self.comm if self.group is None else self.group}

    def barrier(self) -> None:
        """Wait for all ranks, however long they take."""
        if self.comm is not None:
            self.comm.Barrier()
        elif self.launcher == "torchrun":
            dist.barrier(self.group)

    def close(self) -> None:
        """Destroy what ``init_from_env`` made, never what it found. Idempotent. MPI is left to mpi4py's exit."""
        while self._made_here:
            self._made_here.pop()()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def init_from_env(backend: str | None = None, timeout_seconds: float = 600.0) -> Launched:
    """The world that the launcher's environment variables describe.

    - torchrun, or anything that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``: the default process
      group of torch.distributed, initialised here unless it is already. This goes before MPI, as under
      ``srun torchrun``.
    - mpirun, or srun with PMI or PMIx: ``MPI.COMM_WORLD`` of mpi4py, which initialises MPI.
    - none of these: one rank.

    Args:
        backend: of the torch process group; default: gloo, since rows in CPU memory need no more. For tensors on GPUs
            ``"cpu:gloo,cuda:nccl"``, after ``torch.cuda.set_device``. The other launchers have no use for it.
        timeout_seconds: of the torch process group: how long its ranks may take to come, and each collective.

    Raises:
        EPArgumentError: variables are missing, are no numbers, or contradict each other; ``argument`` names the first.
        EPBackendUnavailableError: started by an MPI launcher, but mpi4py is not installed or belongs to another MPI.
        torch.distributed.DistError: torch could not connect the ranks.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env, backend or "gloo", timeout_seconds)
    for rank, size in _MPI:
        if rank in env:
            return _mpi(env, rank, size)
    if found := [name for name in _TORCHRUN if name in env]:
        raise EPArgumentError.of("RANK", f"a rank, since {found[0]} is set, or neither", "no such variable")
    if int(env.get("SLURM_STEP_NUM_TASKS", "1") or 1) > 1:
        remedy = "a launcher's variables beside it: srun --mpi=pmix (or pmi2) for MPI, or torchrun in each task"
        raise EPArgumentError.of("SLURM_STEP_NUM_TASKS", remedy, env["SLURM_STEP_NUM_TASKS"])
    world = thread_world(1)[0]
    return Launched("single", world, None, 0, 1, 0, [world.close])


def _torchrun(env: Mapping[str, str], backend: str, timeout_seconds: float) -> Launched:
    for name in _TORCHRUN:
        if not env.get(name):
            there = "RANK" if env.get("RANK") else "WORLD_SIZE"
            raise EPArgumentError.of(name, f"a value, since {there} is set (torchrun sets both)", "nothing")
    size = _number(env, "WORLD_SIZE", low=1)
    rank = _number(env, "RANK", high=size - 1)
    _number(env, "MASTER_PORT", high=65535)
    local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank
    if not dist.is_available():
        raise EPBackendUnavailableError("torchrun: this torch was built without torch.distributed")
    made_here: list[Any] = []
    if not dist.is_initialized():
        dist.init_process_group(
            backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds), init_method="env://"
        )
        made_here.append(_destroy)
    return Launched("torchrun", dist.group.WORLD, None, dist.get_rank(), dist.get_world_size(), local_rank, made_here)


def _destroy() -> None:
    if dist.is_initialized():  # else the user was faster
        dist.destroy_process_group()


def _mpi(env: Mapping[str, str], rank_name: str, size_name: str) -> Launched:
    rank = _number(env, rank_name)
    if importlib.util.find_spec("mpi4py") is None:
        reason = f"{rank_name} says that an MPI launcher started this, and mpi4py is not installed"
        message = f"mpi: {reason}; pip install mpi4py, or start with torchrun"
        raise EPBackendUnavailableError(message, reasons={"mpi": reason})
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    size = _number(env, size_name, low=1) if env.get(size_name) else comm.Get_size()
    if (rank, size) != (comm.Get_rank(), comm.Get_size()):
        library = MPI.Get_library_version().splitlines()[0]
        reason = (
            f"the launcher started rank {rank} of {size}, and mpi4py's library ({library}) sees rank {comm.Get_rank()} "
            f"of {comm.Get_size()}: it does not belong to that launcher; use the mpirun that came with it"
        )
        raise EPBackendUnavailableError(f"mpi: {reason}", reasons={"mpi": reason})
    local_name = next((name for name in _MPI_LOCAL if name in env), "")
    return Launched("mpi", None, comm, rank, size, _number(env, local_name) if local_name else _local_rank(comm, MPI))


def _local_rank(comm: Any, mpi: Any) -> int:
    on_this_host = comm.Split_type(mpi.COMM_TYPE_SHARED)
    try:
        return int(on_this_host.Get_rank())
    finally:
        on_this_host.Free()


def _number(env: Mapping[str, str], name: str, low: int = 0, high: int = 2**31 - 1) -> int:
    text = env[name]
    if not text.strip().isdecimal() or not low <= int(text) <= high:
        raise EPArgumentError.of(name, f"a whole number from {low} to {high}", repr(text))
    return int(text)
