"""The ``collective`` backend where a process goes, is interrupted or exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from deep_ep_py.backends.collective import CollectiveBackend
from deep_ep_py.communicator import communicator_of
from deep_ep_py.errors import EPError, EPPeerError, EPTimeoutError
from deep_ep_py.settings import Settings
from deep_ep_py.testing import run_processes
from deep_ep_py.testing.worlds import process_context, store_of_processes


def peer_goes(rank, folder, how, ended):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    timeout = 60 if how == "killed" else 1.5
    backend = CollectiveBackend(communicator_of(dist.group.WORLD), Settings(timeout_seconds=timeout))
    backend.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    errors = []
    for _ in range(3):  # the first may still find what rank 2 had sent; the last one raises the same again
        try:
            backend.barrier()
        except EPError as e:  # noqa: PERF203
            errors.append((type(e), e.ranks, e.op, str(e)))
    seconds = time.monotonic() - start
    backend.close()
    ended.put((errors, seconds))


@pytest.mark.processes
@pytest.mark.parametrize(("how", "error"), [("killed", EPPeerError), ("stopped", EPTimeoutError)])
def test_peer_that_is_gone(how, error, tmp_path):
    context = process_context("forkserver")
    ended = context.Queue()
    ranks = [context.Process(target=peer_goes, args=(r, tmp_path, how, ended), daemon=True) for r in range(3)]
    for process in ranks:
        process.start()
    try:
        for _ in range(2):
            errors, seconds = ended.get(timeout=60)
            assert len(errors) >= 2
            assert len(set(errors)) == 1
            kind, who, op, _ = errors[0]
            assert (kind, who, op) == (error, (2,), "barrier"), errors
            assert seconds < 30, "at the deadline only, or never"
        for process in ranks[:2]:
            process.join(timeout=10)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join()


def interrupted(group):
    backend, store = CollectiveBackend(communicator_of(group), Settings(timeout_seconds=60)), store_of_processes()
    if dist.get_rank() == 1:
        store.wait(["interrupted"])
        with pytest.raises(EPPeerError) as caught:
            for _ in range(2):  # the first one may still find what rank 0 had sent
                backend.barrier()
        assert caught.value.op == "barrier"
        assert caught.value.ranks == (0,)
        backend.close()
        return True
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored for what it backgrounds
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        backend.barrier()
    store.set("interrupted", "")
    with pytest.raises(EPError, match="KeyboardInterrupt"):
        backend.barrier()
    backend.close()
    return True


@pytest.mark.processes
def test_ctrl_c():
    assert run_processes(2, interrupted) == [True, True]


UNCLOSED = """
import threading, torch
from deep_ep_py.backends.collective import CollectiveBackend
from deep_ep_py.communicator import thread_world
from deep_ep_py.settings import Settings
from deep_ep_py.plans import Plan
from deep_ep_py.types import CombineSpec

def rank_body(c):
    b = backends[c.rank] = CollectiveBackend(c, Settings(timeout_seconds=1000))
    empty = torch.zeros(0, 2, dtype=torch.int32)
    plan = Plan.pack(
        layout="topk", targets=empty.long(), rank_prefix=torch.zeros(2, 2), expert_counts=torch.zeros(2), rank=c.rank,
        num_rows=0, num_output_rows=0, num_recv_tokens=0, digest=1, expert_alignment=1, num_max_tokens_per_rank=0,
    )
    for _ in range({operations} - c.rank * {missing}):
        flight = b.prepare_combine(CombineSpec(torch.zeros(0, 4), plan), background=True)
        b.combine_send(flight)

backends = dict()
threads = [threading.Thread(target=rank_body, args=(c,)) for c in thread_world(2)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


@pytest.mark.parametrize("missing", [0, 1], ids=["in flight", "waiting for nobody"])
def test_interpreter_exit_with_an_open_backend(missing):
    """The worker is not a daemon, and yet neither idle nor stuck does it hold up the exit: here until the deadline of
    its operation, which the test does not wait for."""
    code = UNCLOSED.format(operations=3, missing=missing)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
