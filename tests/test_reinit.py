"""A process group is destroyed and made again in the same processes, while buffers of the old one are variables."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep_py import Buffer, ElasticBuffer, EPError, EPPeerError, EPTimeoutError, Settings
from deep_ep_py.nn import MoELayer
from deep_ep_py.testing import run_processes

R, SECONDS = 4, timedelta(seconds=30)


def settings(backend: str, rank: int, seconds: float = 20.0) -> Settings:
    domain = f"half {rank // 2}" if backend == "hybrid" else ""
    return Settings(backend=backend, domain=domain, timeout_seconds=seconds, connect_timeout_seconds=20)


class Worlds:
    """One rank's process groups, one after the other on one port."""

    def __init__(self, group: Any, folder: str) -> None:
        self.rank, self.folder, self.made = group.rank(), Path(folder), 0
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = torch.tensor([s.getsockname()[1]])
        dist.broadcast(port, 0)
        self.address = f"tcp://127.0.0.1:{port.item()}"
        dist.destroy_process_group()

    def end(self) -> bool:
        """A world for the harness to destroy."""
        dist.init_process_group("gloo", init_method=self.address, rank=self.rank, world_size=R, timeout=SECONDS)
        return True

    @contextmanager
    def another(self) -> Iterator[Any]:
        dist.init_process_group("gloo", init_method=self.address, rank=self.rank, world_size=R, timeout=SECONDS)
        self.made += 1
        yield dist.group.WORLD
        dist.barrier()
        dist.destroy_process_group()
        # Else a fast rank would find the old store, of which rank 0 has the server.
        (self.folder / f"{self.made} {self.rank}").touch()
        while len(list(self.folder.glob(f"{self.made} *"))) < R:
            time.sleep(0.01)


def held() -> dict[str, int]:
    """What this process holds open, by kind, and its threads."""
    links = list(Path("/proc/self/fd").iterdir())
    kinds = Counter(re.split(r"[: ]", str(link.readlink()))[0] for link in links if link.is_symlink())
    return {**kinds, "threads": len(list(Path("/proc/self/task").iterdir()))}


def settled(**wanted: int) -> dict[str, int]:
    """What is held, after a moment in which threads that have nothing to do may end."""
    deadline = time.monotonic() + 20
    while not wanted.items() <= (found := held()).items() and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def round_trip(buffer: ElasticBuffer) -> Any:
    x = torch.arange(R * 4.0).view(R, 4) + buffer.rank_idx
    for background in (False, True):
        got = buffer.dispatch(x, torch.arange(R)[:, None], num_experts=R, async_with_compute_stream=background)
        if background:
            got[4].current_stream_wait()
        assert torch.equal(buffer.combine(got[0], got[3])[0], x)
    return got[0], got[0].clone(), got[3]


def made_again(group: Any, folder: str) -> bool:
    worlds, old, layers, after = Worlds(group, folder), [], [], []
    before = held()
    for _ in range(3):
        with worlds.another() as world:
            for backend in ("shm", "collective", "hybrid"):
                chosen = settings(backend, worlds.rank)
                v1, v2 = Buffer(world, settings=chosen), ElasticBuffer(world, settings=chosen)
                layer = MoELayer(4, 4, 2 * R, 1, v2)  # its parameters are DTensors of the group
                layers.append((layer, layer(torch.ones(2, 4)).output))
                layers[-1][1].sum().backward()
                old.append((v1, v2, *round_trip(v2)))
                v1.destroy()
                v2.destroy()
        del world
        after.append(settled(**(after[0] if after else {k: before[k] for k in ("socket", "threads")})))
        for v1, v2, rows, copy, handle in old:
            assert (v1.group, v1.mesh, v2.group, v2.mesh) == (None,) * 4
            assert torch.equal(rows, copy)
            with pytest.raises(EPError, match=r"destroyed|closed"):
                v2.combine(rows, handle)
            assert repr(v1).endswith(", destroyed>") and repr(v2).endswith(", destroyed>")
    # The first world makes torch open a pipe or two for good.
    assert after[0] == after[1] == after[2], after
    assert all(after[0][kind] == before[kind] for kind in ("socket", "threads", "anon_inode")), (before, after)

    with worlds.another() as world:
        for backend in ("collective", "hybrid"):
            lost = ElasticBuffer(world, settings=settings(backend, worlds.rank, 1.0))
            if worlds.rank != R - 1:
                with pytest.raises((EPTimeoutError, EPPeerError)):
                    round_trip(lost)
            dist.barrier()
            lost.destroy()
            old.append((lost, lost, None, None, None))
    del world
    assert settled(**after[0]) == after[0]
    with worlds.another() as world, ElasticBuffer(world, settings=settings("collective", worlds.rank)) as buffer:
        round_trip(buffer)
    del world
    return worlds.end()


@pytest.mark.processes
def test_group_is_made_again(tmp_path: Path) -> None:
    assert run_processes(R, made_again, str(tmp_path)) == [True] * R
