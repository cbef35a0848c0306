"""init_from_env: one program under torchrun, mpirun and plain python; what is wrong with variables is said."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import socket
import subprocess
import sys
import types

import pytest
import test_mpi
import torch.distributed as dist

from deep_ep_py.buffer import Buffer
from deep_ep_py.errors import EPArgumentError, EPBackendUnavailableError
from deep_ep_py.launch import init_from_env

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PROGRAM = """
import json, sys
from pathlib import Path
from deep_ep_py.launch import init_from_env
with init_from_env() as world:
    world.barrier()
    seen = [world.launcher, world.rank, world.world_size, world.local_rank, world.group is None, world.comm is None]
    (Path(sys.argv[1]) / str(world.rank)).write_text(json.dumps(seen))
world.close()
"""


@pytest.fixture
def env(monkeypatch):
    """Set the launcher's variables to these, and no others."""

    def only(**values):
        for name in (*NAMES, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return dict(os.environ)

    return only


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_single(env):
    before = env()
    with init_from_env() as world:
        assert (world.launcher, world.rank, world.world_size, world.local_rank) == ("single", 0, 1, 0)
        world.barrier()
        buffer = Buffer(**world.arguments, backend="collective")
        assert buffer.group_size == 1
        buffer.destroy()
    world.close()
    assert dict(os.environ) == before


def test_torch_group_is_made_and_destroyed(env):
    before = env(**TORCHRUN | {"MASTER_PORT": free_port()})
    with init_from_env("gloo", timeout_seconds=20) as world:
        assert (world.launcher, world.rank, world.world_size, world.local_rank) == ("torchrun", 0, 1, 0)
        assert world.group is dist.group.WORLD
        assert dist.get_backend() == "gloo"
        world.barrier()
        with init_from_env() as found:  # a group that somebody else made stays
            assert found.group is world.group
        assert dist.is_initialized()
        buffer = Buffer(**world.arguments, backend="collective")
        buffer.destroy()
    assert not dist.is_initialized()
    world.close()
    assert dict(os.environ) == before


@pytest.mark.parametrize("missing", TORCHRUN)
def test_half_set(env, missing):
    env(**{name: value for name, value in TORCHRUN.items() if name != missing})
    with pytest.raises(EPArgumentError) as caught:
        init_from_env()
    assert caught.value.argument == missing
    assert "is set" in caught.value.expected


def test_address_alone(env):
    env(MASTER_ADDR="127.0.0.1")
    with pytest.raises(EPArgumentError, match="MASTER_ADDR") as caught:
        init_from_env()
    assert caught.value.argument == "RANK"


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "1"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("MASTER_PORT", "x")]
)
def test_no_such_number(env, name, value):
    env(**TORCHRUN | {name: value})
    with pytest.raises(EPArgumentError, match=f"'{value}'") as caught:
        init_from_env()
    assert caught.value.argument == name


def test_mpirun_without_mpi4py(env, monkeypatch):
    env(PMI_RANK="0", PMI_SIZE="2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EPBackendUnavailableError, match=r"PMI_RANK.*mpi4py is not installed.*pip install"):
        init_from_env()


def fake_mpi4py(monkeypatch, rank, size):
    """An mpi4py whose world is ``rank`` of ``size``."""
    package, mpi = types.ModuleType("mpi4py"), types.ModuleType("mpi4py.MPI")
    package.__spec__ = importlib.machinery.ModuleSpec("mpi4py", None)
    package.MPI = mpi
    mpi.COMM_WORLD = types.SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: size)
    mpi.Get_library_version = lambda: "Some MPI v1\nmore"
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    return mpi


def test_mpirun_of_another_mpi(env, monkeypatch):
    """The library that does not know the launcher makes a world of one, and every rank would be alone."""
    fake_mpi4py(monkeypatch, 0, 1)
    env(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(EPBackendUnavailableError, match=r"rank 1 of 4.*Some MPI v1\).*rank 0 of 1"):
        init_from_env()


def test_torchrun_goes_before_mpi(env, monkeypatch):
    fake = fake_mpi4py(monkeypatch, 3, 4)
    env(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1", MASTER_ADDR="127.0.0.1")
    world = init_from_env()
    assert (world.launcher, world.rank, world.world_size, world.local_rank) == ("mpi", 3, 4, 1)
    assert world.comm is fake.COMM_WORLD
    assert world.group is None
    assert world.arguments == {"group": fake.COMM_WORLD}
    env(PMI_RANK="3", PMI_SIZE="4", **TORCHRUN | {"MASTER_PORT": free_port()})
    with init_from_env() as world:
        assert (world.launcher, world.comm) == ("torchrun", None)


def run_program(tmp_path, command):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [*command, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        env=test_mpi.environment(),
        timeout=80,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.processes
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert run_program(tmp_path, command) == [["torchrun", r, 2, r, False, True] for r in range(2)]


@pytest.mark.mpi
@pytest.mark.skipif(bool(test_mpi.unavailable()), reason=test_mpi.unavailable())
def test_under_mpirun(tmp_path):
    assert run_program(tmp_path, test_mpi.mpirun(2)) == [["mpi", r, 2, r, True, False] for r in range(2)]
