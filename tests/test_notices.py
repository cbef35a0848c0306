"""What a buffer writes to the log, and how often; and whom it waits for."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import pytest
import torch

import deep_ep_py as ep
from deep_ep_py.errors import EPError
from deep_ep_py.settings import Settings
from deep_ep_py.testing import run_threads
from deep_ep_py.testing.cases import settings_for

TOPK_IDX = torch.tensor([[0, 1], [2, 3]])


def lines(caplog, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "deep_ep_py" and r.levelno == level]


def pair(buffer: ep.ElasticBuffer, num_tokens: int = 2, hidden: int = 8) -> torch.Tensor:
    idx = TOPK_IDX.repeat(num_tokens // 2, 1)
    got = buffer.dispatch(torch.ones(num_tokens, hidden), idx, num_experts=4)
    buffer.combine(got[0], got[3])
    return got[0]


# --- the choice of a backend ------------------------------------------------------------------------------------------


def built(communicator, backend, domain=""):
    buffer = ep.ElasticBuffer(communicator, backend=backend, settings=Settings(domain=domain.format(communicator.rank)))
    name = buffer.backend_info().name
    buffer.destroy()
    return name


def test_auto_that_falls_back_warns_once(monkeypatch, caplog):
    """On one rank of all, with the reason and the remedy."""
    monkeypatch.setattr("deep_ep_py.choice.unavailable_because", lambda hosts: "no memfd here")
    assert run_threads(3, built, "auto") == ["collective"] * 3
    (line,) = lines(caplog, logging.WARNING)
    assert "took 'collective', which is slower than 'shm'" in line
    assert "shm: no memfd here" in line and "hybrid: all ranks are in one domain" in line
    assert "doctor" in line and "DEEP_EP_PY_BACKEND=collective" in line


def test_a_backend_by_name_and_the_first_do_not_warn(caplog):
    for name in ("auto", "collective"):
        run_threads(2, built, name)
    assert not lines(caplog, logging.WARNING)


def test_several_machines_are_no_fault(caplog):
    caplog.set_level(logging.INFO, "deep_ep_py")
    assert run_threads(2, built, "auto", "host {}") == ["hybrid"] * 2
    assert not lines(caplog, logging.WARNING)
    (line,) = lines(caplog, logging.INFO)
    assert "'hybrid' carries the rows of 2 domains" in line


# --- memory -----------------------------------------------------------------------------------------------------------


def holding(communicator):
    """Two buffers that hold all that they may: a warning for each."""
    for _ in range(2):
        buffer = ep.ElasticBuffer(communicator, backend="shm", settings=Settings(max_heap_bytes=1 << 20))
        held = [pair(buffer, 64, 1024) for _ in range(8)]
        assert buffer.statistics().moved_to_ordinary_memory > 1
        del held
        buffer.destroy()


def test_ordinary_memory_warns_once_a_buffer(caplog):
    run_threads(2, holding)
    found = lines(caplog, logging.WARNING)
    assert sorted(line[:7] for line in found) == ["rank 0:", "rank 0:", "rank 1:", "rank 1:"]
    assert all("a heap that may give 1 MiB" in line and "DEEP_EP_PY_MAX_HEAP_BYTES" in line for line in found)


def growing(communicator, num_bytes):
    buffer = ep.ElasticBuffer(communicator, num_bytes, backend="shm")
    for _ in range(3):
        pair(buffer, 4096, 1024)
    pair(buffer)  # growth of a combine is told by the dispatch after it
    segments = buffer.statistics().segments
    buffer.destroy()
    return segments


def test_growth_is_told(caplog):
    caplog.set_level(logging.INFO, "deep_ep_py")
    (segments,) = run_threads(1, growing, None)
    found = lines(caplog, logging.INFO)
    assert segments > 1 and f"in {segments} segments" in found[-1]
    assert len(found) < segments, "once for each time that it grew, and not for each call"
    caplog.clear()
    assert run_threads(1, growing, 1 << 28) == [1]
    assert not lines(caplog, logging.INFO)


# --- failures ---------------------------------------------------------------------------------------------------------


def abandoned(communicator, backend, background):
    """Rank 1 does not come to the second dispatch."""
    settings = replace(settings_for(backend, communicator.rank, 2), timeout_seconds=0.5)
    buffer = ep.ElasticBuffer(communicator, backend=backend, settings=settings)
    received, _, _, handle, _ = buffer.dispatch(torch.ones(2, 8), TOPK_IDX, num_experts=4)
    if communicator.rank == 0:
        for _ in range(1 if background else 3):  # in the background the wait tells it, with no call after it
            with pytest.raises(EPError):
                if background:
                    buffer.combine(received, handle, async_with_compute_stream=True)[-1].current_stream_wait()
                else:
                    buffer.combine(received, handle)
    else:
        time.sleep(1.5)
    buffer.destroy()


@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
def test_a_lost_buffer_says_why_once(caplog, backend, background):
    run_threads(2, abandoned, backend, background)
    (line,) = lines(caplog, logging.ERROR)
    assert line.startswith("rank 0 of 2: this buffer failed in combine (operation 2, phase notify)")
    assert "EPTimeoutError" in line and "torch.compile" in line


def refused(communicator, backend):
    settings = settings_for(backend, communicator.rank, 2)
    buffer = ep.ElasticBuffer(communicator, backend=backend, settings=settings)
    with pytest.raises(EPError):
        buffer.dispatch(torch.ones(2, 8), TOPK_IDX, num_experts=1 if communicator.rank else 4)
    buffer.destroy()
    with pytest.raises(EPError):
        buffer._engine.barrier()


def test_what_leaves_the_buffer_usable_is_no_error_line(caplog, backend):
    run_threads(2, refused, backend)
    assert not lines(caplog, logging.ERROR)


# --- who is waited for ------------------------------------------------------------------------------------------------

NUM_RANKS, LATE, SECONDS, TURNS = 4, 2, 0.15, 4


def slow(communicator, backend, here):
    """Rank 2 sets out for each dispatch long after all others have."""
    settings = settings_for(backend, communicator.rank, NUM_RANKS)
    buffer = ep.ElasticBuffer(communicator, backend=backend, settings=settings)
    for _ in range(TURNS):
        here.wait()
        if communicator.rank == LATE:
            time.sleep(SECONDS)
        pair(buffer)
    buffer._engine.barrier()  # `collective` tells of an operation's waits in the next one
    waited = buffer.statistics().wait_seconds
    buffer._engine.barrier()
    buffer.destroy()
    assert buffer.statistics().wait_seconds.keys() == waited.keys()
    return waited


def test_waits_name_the_straggler(backend):
    waited = run_threads(NUM_RANKS, slow, backend, threading.Barrier(NUM_RANKS, timeout=60))
    for rank, by_rank in enumerate(waited):
        # Two domains of two ranks: rank 1 waits for its neighbour and for rank 3, who both wait for rank 2.
        known = {0: {1, 2}, 1: {0, 3}, 2: {0, 3}, 3: {1, 2}}[rank] if backend == "hybrid" else set(range(NUM_RANKS))
        assert by_rank.keys() == known - {rank}
        if rank != LATE and LATE in known:
            assert max(by_rank, key=by_rank.__getitem__) == LATE, by_rank
            assert by_rank[LATE] > SECONDS, by_rank
