"""Ranks that run a client's real code, with ``deep_ep`` being this library: forked from one process that has it loaded.

``python ranks.py <module> <folder> <number of ranks>:<function> ...`` imports the module of checks (slow: whole
frameworks) and plays one world after the other. Ranks leave as any program does: they return from the main module, so
that each of them also tests the interpreter's exit. Per world the folder gets, for each rank, what the function
returned (JSON), what came on stderr, and the exit status.

Where ranks use collectives of their own they destroy the process group at the end. Else torch itself may abort the
process ("terminate called without an active exception"): gloo's worker thread (`pt_gloo_runloop`) drops the last
reference to a tensor, waits for the interpreter's lock in a destructor, and is ended there by the interpreter's exit.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

WORLD_SECONDS = 60.0
LEAVING = 10  # worlds of each client that only use their buffer and leave: an abort at exit may be rare
GRACE_SECONDS = 5.0  # for the others, once a rank has failed


def play_worlds(module: str, folder: Path, worlds: list[str], timeout_seconds: float = 240.0) -> list[list[Any]]:
    """What the ranks of each world returned. Every rank must report, leave with 0, and have nothing on stderr."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",  # clients compile small helpers, which would need a compiler and take minutes
    }
    # Clients warn about their own affairs; what else comes on stderr is to be seen.
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), module, str(folder), *worlds]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        said, _ = parent.communicate(timeout=timeout_seconds)
    except BaseException:
        os.killpg(parent.pid, signal.SIGKILL)  # its ranks too
        parent.wait()
        raise
    assert parent.returncode == 0, said
    found = []
    for number, world in enumerate(worlds):
        ranks = []
        for rank in range(int(world.partition(":")[0])):
            place = f"{folder}/{number}.{rank}"
            stderr = Path(f"{place}.stderr").read_text()
            status = int(Path(f"{place}.status").read_text())
            left = f"world {number} ({world}): rank {rank} left with {status} and said\n{stderr}"
            assert status == 0 and stderr == "", left
            ranks.append(json.loads(Path(f"{place}.json").read_text()))
        found.append(ranks)
    return found


def check_and_leave(module: str, folder: Path, ways: tuple[str, ...]) -> tuple[dict[int, list[Any]], list[list[Any]]]:
    """The results of ``checks`` by number of ranks, and those of :data:`LEAVING` worlds that then leave in each way."""
    sizes = (2, 3, 4)
    leaving = [f"2:{ways[run % len(ways)]}" for run in range(LEAVING)]
    played = play_worlds(module, folder, [*(f"{n}:checks" for n in sizes), *leaving])
    return dict(zip(sizes, played, strict=False)), played[len(sizes) :]


def need(*packages: str) -> list[Any]:
    """Marks: skip the module's tests where a client is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    reason = f"client packages are not installed: {', '.join(missing)} (see `clients` in pyproject.toml)"
    return [pytest.mark.clients, pytest.mark.skipif(bool(missing), reason=reason)]


def _rank(function: Any, rank: int, num_ranks: int, place: str) -> None:
    import torch
    import torch.distributed as dist

    for number in (1, 2):  # gloo writes greetings to stdout
        target = os.open(f"{place}.{rank}.{'stdout' if number == 1 else 'stderr'}", os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(target, number)
        os.close(target)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}.store", rank=rank, world_size=num_ranks)
    result = function(rank, num_ranks)
    Path(f"{place}.{rank}.json").write_text(json.dumps(result))


def _wait(pids: list[int], place: str) -> None:
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + WORLD_SECONDS
    while len(statuses) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
                    Path(f"{place}.{rank}.status").write_text(str(statuses[rank]))
        if any(statuses.values()):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in statuses:
                    os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


def _main() -> None:
    module, folder, *worlds = sys.argv[1:]
    from deep_ep_py import compat

    compat.install()
    checks = importlib.import_module(module)
    for number, world in enumerate(worlds):
        num_ranks, _, name = world.partition(":")
        place = str(Path(folder) / str(number))
        pids = []
        for rank in range(int(num_ranks)):
            pid = os.fork()
            if pid == 0:
                return _rank(getattr(checks, name), rank, int(num_ranks), place)
            pids.append(pid)
        _wait(pids, place)
    return None


if __name__ == "__main__":
    _main()
