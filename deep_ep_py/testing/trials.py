"""Trials of a world of ranks: a round trip of each backend, and the system calls that shared memory needs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ..communicator import Communicator, communicator_of
from ..elastic import ElasticBuffer
from ..errors import EPError
from ..settings import Settings
from ..types import ExpertPlacement
from .devices import carried

#: One decode step of DeepSeek-V3 on each rank.
TOKENS, HIDDEN, TOPK, EXPERTS = 128, 7168, 8, 256
REPEATS = 5
SYSTEM_CALLS = "system calls"
NOT_TRIED = "not tried"
#: FUTEX's system call number; Python has no wrapper. Elsewhere the round trip alone must show that it works.
FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
FUTEX_WAIT, FUTEX_WAKE = 0, 1

Outcome = dict[str, Any]


def try_backends(group: Any, names: Sequence[str], settings: Settings, seconds: float) -> dict[str, Outcome]:
    """One rank of the trials: what it found, by backend, and ``SYSTEM_CALLS`` where ranks are processes."""
    found: dict[str, Outcome] = {}
    limit = min(settings.timeout_seconds, seconds / 4)
    if dist.is_available() and isinstance(group, dist.ProcessGroup) and sys.platform == "linux":
        found[SYSTEM_CALLS] = system_calls(communicator_of(group), limit)
    for name in names:
        mine = replace(settings, backend=name, timeout_seconds=limit, connect_timeout_seconds=limit)
        try:
            found[name] = round_trip(group, mine)
        except Exception as e:  # whatever it is, the report carries it
            found[name] = {"error": str(e) if isinstance(e, EPError) else f"{type(e).__name__}: {e}"}
    return found


def round_trip(group: Any, settings: Settings) -> Outcome:
    """Dispatch and combine, compared with what one process computes; the median time of a few."""
    opened = ElasticBuffer(group, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK, settings=settings)
    buffer = carried(opened)
    try:
        ranks, me = buffer.num_ranks, buffer.rank_idx
        seeded = torch.Generator().manual_seed(1)
        # Small whole numbers: sums are exact, so that the results can be compared bit by bit.
        tokens = torch.randint(-4, 5, (ranks, TOKENS, HIDDEN), generator=seeded, dtype=torch.int8).to(torch.bfloat16)
        topk_idx = torch.rand((ranks, TOKENS, EXPERTS), generator=seeded).topk(TOPK).indices
        owner = ExpertPlacement.of(EXPERTS, ranks).rank[topk_idx]
        in_rank = torch.stack([(owner == r).any(-1) for r in range(ranks)], dim=-1)
        times, wrong = [], ""
        for _ in range(REPEATS):
            buffer.barrier()
            start = time.perf_counter()
            recv_x, _, _, handle, _ = buffer.dispatch(tokens[me], topk_idx[me], num_experts=EXPERTS)
            combined, _, _ = buffer.combine(recv_x, handle)
            times.append(time.perf_counter() - start)
            if not torch.equal(recv_x, tokens[in_rank[:, :, me]]):
                wrong = "dispatch delivered other rows than were sent"
            elif not torch.equal(combined, (tokens[me].float() * in_rank[me].sum(1, keepdim=True)).to(torch.bfloat16)):
                wrong = "combine delivered another sum than the rows have"
            del recv_x, handle, combined
        buffer.barrier()
        if wrong:  # only now: the peers' errors would tell of a rank that left, and not why
            raise EPError(wrong)
        info = buffer.backend_info()
        return {"name": info.name, "refused": info.refused, "seconds": statistics.median(times)}
    finally:
        opened.destroy()


def worst_of(by_rank: list[dict[str, Outcome]]) -> dict[str, Outcome]:
    """The worst of all ranks: the first error, the longest time."""
    merged: dict[str, Outcome] = {}
    for name in by_rank[0]:
        outcomes = [found[name] for found in by_rank]
        if name == SYSTEM_CALLS:
            # A failure says more than a trial that was left out, and that more than a success.
            told = {call: [o[call] for o in outcomes] for call in outcomes[0]}
            merged[name] = {
                c: max(t, key=lambda why: (why != "", not why.startswith(NOT_TRIED))) for c, t in told.items()
            }
            continue
        worst = next((o for o in outcomes if "error" in o), None)
        merged[name] = worst or max(outcomes, key=lambda o: o.get("seconds", 0.0))
    return merged


def system_calls(communicator: Communicator, seconds: float) -> dict[str, str]:
    """What shared memory between processes needs, tried on the next rank; by name, why it failed, or empty."""
    found = dict.fromkeys(("memfd", "/proc/<pid>/fd", "pidfd", "futex"), NOT_TRIED)

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except OSError as e:
            found[name] = str(e)
            return None
        except AttributeError as e:  # a Python built on an old system lacks the newer calls
            found[name] = f"{NOT_TRIED}: {e}"
            return None
        found[name] = ""
        return result

    def exchange(mine: Any, what: str) -> list[Any]:
        answers = communicator.exchange(json.dumps(mine).encode(), timeout=seconds, what=f"doctor: {what}")
        return [json.loads(a) for a in answers]

    with contextlib.ExitStack() as held:
        fd = attempt("memfd", _sealed_memfd)
        own = None
        if fd is not None:
            held.callback(os.close, fd)
            own = held.enter_context(contextlib.closing(mmap.mmap(fd, mmap.PAGESIZE)))
        next_rank = (communicator.rank + 1) % communicator.size
        pid, peer_fd = exchange([os.getpid(), fd], "descriptors")[next_rank]
        pidfd = attempt("pidfd", lambda: os.pidfd_open(pid))
        if pidfd is not None:
            os.close(pidfd)
        path, theirs = f"/proc/{pid}/fd/{peer_fd}", None
        opened = None if peer_fd is None else attempt("/proc/<pid>/fd", lambda: os.open(path, os.O_RDWR))
        if opened is not None:
            theirs = held.enter_context(contextlib.closing(mmap.mmap(opened, mmap.PAGESIZE)))
            os.close(opened)
        # A rank waits on its own page while a thread of it wakes the next rank's, so all must have come this far.
        if all(exchange(own is not None and theirs is not None, "mapped")) and platform.machine() in FUTEX:
            waker = threading.Thread(target=_futex, args=(theirs, FUTEX_WAKE, seconds), daemon=True)
            waker.start()
            attempt("futex", lambda: _futex(own, FUTEX_WAIT, seconds))
            waker.join()
        exchange(None, "done")
    return found


def _sealed_memfd() -> int:
    import fcntl

    fd = os.memfd_create("deep_ep_py doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, mmap.PAGESIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def _futex(page: Any, operation: int, seconds: float) -> None:
    """Wait on a page's first word until woken, or wake until somebody was; OSError if neither in time."""
    word = ctypes.c_uint32.from_buffer(page)
    libc = ctypes.CDLL(None, use_errno=True)
    limit = (ctypes.c_long * 2)(int(seconds), 0)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            value = 0 if operation == FUTEX_WAIT else 1
            number = ctypes.c_long(FUTEX[platform.machine()])
            done = libc.syscall(number, ctypes.byref(word), operation, value, ctypes.byref(limit), None, 0)
            if done < 0 or done == value:
                break
            time.sleep(1e-3)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        del word  # a mapping with a view on it cannot be closed
