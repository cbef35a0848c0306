"""Starts the ranks of a program on the hosts of a test network: by torchrun, by mpirun, or forked.

Each launcher takes ranks by host (``[2, 2]``, or uneven) and returns a :class:`World`. A rank runs :func:`scenes.main`,
which leaves one line of JSON in the world's folder. All hosts share one kernel, so a rank is told its domain.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scenes
from network import INTERFACE, Network

from deep_ep_py.testing.worlds import process_context

SCENES = Path(__file__).with_name("scenes.py")
PORT = 29500  # of torch's store, on host 0; each network has ports of its own
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000


class World:
    """Ranks under way. Leaving it kills every process on the network's hosts, and removes the folder.

    Attributes:
        ranks_of: the ranks of each host.
        folder: results, marks and what the processes wrote.
    """

    def __init__(self, network: Network, ranks_by_host: Sequence[int]) -> None:
        self.network = network
        first = [sum(ranks_by_host[:host]) for host in range(len(ranks_by_host))]
        self.ranks_of = [list(range(f, f + n)) for f, n in zip(first, ranks_by_host, strict=True)]
        self.num_ranks = sum(ranks_by_host)
        self._temporary = tempfile.TemporaryDirectory(prefix="deepep-net-")
        self.folder = Path(self._temporary.name)
        self.processes: list[Any] = []  # of subprocess or of multiprocessing

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.network.kill()
        for process in self.processes:
            process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()
        self._temporary.cleanup()

    def spawn(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            )

    def wait_for(self, mark: str, timeout: float) -> None:
        """Until every rank has left ``mark``; see :meth:`scenes.Place.leave_mark`."""
        marks = [self.folder / f"{mark}.{rank}" for rank in range(self.num_ranks)]
        self._wait(lambda: all(m.exists() for m in marks), timeout)
        missing = [m.name for m in marks if not m.exists()]
        assert not missing, f"no {missing} within {timeout} s\n{self.logs()}"

    def open(self, gate: str) -> None:
        """Let the ranks go on from a gate; see :meth:`scenes.Place.wait_at_gate`."""
        (self.folder / f"{gate}.open").touch()

    def results(self, timeout: float, ranks: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
        """What ``ranks`` (or all) reported, as soon as all have, or at the end of every process or of ``timeout``."""
        files = {rank: self.folder / f"result.{rank}" for rank in (range(self.num_ranks) if ranks is None else ranks)}
        self._wait(lambda: all(f.exists() for f in files.values()), timeout)
        return {rank: json.loads(f.read_text()) for rank, f in files.items() if f.exists()}

    def values(self, timeout: float) -> list[Any]:
        """What the scene returned on every rank. Fails where one raised, or where a process did not end with 0."""
        results = self.results(timeout)
        bad = {
            rank: results.get(rank, "nothing") for rank in range(self.num_ranks) if "value" not in results.get(rank, ())
        }
        assert not bad, f"{bad}\n{self.logs()}"
        self._wait(lambda: False, 30)
        assert self.exit_codes() == [0] * len(self.processes), f"{self.exit_codes()}\n{self.logs()}"
        return [results[rank]["value"] for rank in range(self.num_ranks)]

    def exit_codes(self) -> list[int | None]:
        """Of the processes started here (agents, mpirun, forked ranks); None: it runs."""
        return [p.poll() if isinstance(p, subprocess.Popen) else p.exitcode for p in self.processes]

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))

    def _wait(self, reached: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not reached() and None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(0.02)


def torchrun(network: Network, ranks_by_host: Sequence[int], scene: str, **arguments: Any) -> World:
    """One agent on each host. The first host's agent keeps the store."""
    world = World(network, ranks_by_host)
    for host, num_ranks in enumerate(ranks_by_host):
        options = {
            "nnodes": len(ranks_by_host),
            "nproc-per-node": num_ranks,
            "node-rank": host,
            "master-addr": network.address(0),
            "master-port": PORT,
            "local-addr": network.address(host),
        }
        agent = [sys.executable, "-m", "torch.distributed.run", *(f"--{k}={v}" for k, v in options.items())]
        command = network.command(host, *agent, *_program(world, scene, arguments)[1:])
        world.spawn(f"host{host}", command, _environment(network, host))
    return world


def mpirun(network: Network, ranks_by_host: Sequence[int], scene: str, **arguments: Any) -> World:
    """One ``mpirun`` on the first host, Open MPI's or MPICH's, which reaches the others through an agent of ours."""
    world = World(network, ranks_by_host)
    agent = _write_agent(world)
    program = mpirun_program()
    assert program is not None
    hosts = ",".join(f"{network.address(host)}:{n}" for host, n in enumerate(ranks_by_host))
    count = ["-n", str(world.num_ranks)]
    if is_mpich(program):
        how = ["-launcher", "ssh", "-launcher-exec", str(agent), "-hosts", hosts, "-iface", INTERFACE]
        # UCX knows hosts by their kernel, and would take all of them for one.
        how += ["-genv", "UCX_TLS", "tcp,self", "-genv", "UCX_NET_DEVICES", INTERFACE]
    else:
        own = f"{network.address(0)}/24"
        how = ["--host", hosts, "--map-by", "slot", "--bind-to", "none"]
        how += ["--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", own]
        how += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", own]
    environment = _environment(network, 0)
    if os.geteuid() == 0:
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    # Ranks have the environment of the daemon that starts them or of mpirun, so each asks where it is.
    ask = ["sh", "-c", 'DEEP_EP_PY_DOMAIN=$(hostname) exec "$@"', "sh", *_program(world, scene, arguments)]
    world.spawn("mpirun", network.command(0, program, *count, *how, *ask), environment)
    return world


def mpirun_program() -> str | None:
    """The one beside this Python, else the one on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def is_mpich(program: str) -> bool:
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    return "HYDRA" in told


def forked(network: Network, ranks_by_host: Sequence[int], scene: str, **arguments: Any) -> World:
    """Ranks forked from a server that has torch loaded: tenths of a second each, and not the seconds of an import."""
    world = World(network, ranks_by_host)
    context = process_context("forkserver")
    for host, ranks in enumerate(world.ranks_of):
        for rank in ranks:
            torch = {"RANK": rank, "WORLD_SIZE": world.num_ranks, "LOCAL_RANK": rank - ranks[0]}
            environment = _environment(network, host) | {name: str(value) for name, value in torch.items()}
            place = (f"/run/netns/{network.namespace(host)}", environment, str(world.folder / f"rank{rank}.log"))
            process = context.Process(
                target=_forked_rank, args=(*place, scene, str(world.folder), arguments), daemon=True
            )
            process.start()
            world.processes.append(process)
    return world


def _forked_rank(
    namespace: str, environment: dict[str, str], log: str, scene: str, folder: str, arguments: dict[str, Any]
) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with Path(namespace).open() as f:
        if libc.setns(f.fileno(), CLONE_NEWNET) != 0 or libc.unshare(CLONE_NEWUTS) != 0:
            raise OSError(ctypes.get_errno(), f"could not enter {namespace}")
    socket.sethostname(environment["DEEP_EP_PY_DOMAIN"])
    os.environ.clear()
    os.environ.update(environment)
    with Path(log).open("w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    scenes.main(scene, folder, json.dumps(arguments))


def _program(world: World, scene: str, arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, str(SCENES), scene, str(world.folder), json.dumps(arguments)]


def _environment(network: Network, host: int) -> dict[str, str]:
    """The test's own, without what would lead a rank to another world."""
    foreign = ("TORCHELASTIC_", "OMPI_", "PMI", "PRTE_", "MASTER_", "RANK", "LOCAL_", "WORLD_", "GROUP_", "DEEP_EP_PY_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    own = {"DEEP_EP_PY_DOMAIN": network.name(host), "GLOO_SOCKET_IFNAME": INTERFACE}
    store = {"MASTER_ADDR": network.address(0), "MASTER_PORT": str(PORT)}
    return environment | own | store | {"OMP_NUM_THREADS": "1"}


def _write_agent(world: World) -> Path:
    """A stand-in for ssh: goes to the host that has the address and runs the command line there, through a shell."""
    network = world.network
    lines = ["#!/bin/sh", "while :; do case $1 in -*) shift ;; *) break ;; esac; done", "address=$1; shift"]
    lines += ["case $address in"]
    for host in network.hosts:
        command = network.command(host, "sh", "-c", 'eval "$*"', "sh")
        lines.append(f'{network.address(host)}) exec {shlex.join(command)} "$@" ;;')
    lines += ["esac", 'echo "no host has the address $address" >&2', "exit 255"]
    agent = world.folder / "agent"
    agent.write_text("\n".join(lines) + "\n")
    agent.chmod(0o700)
    return agent
