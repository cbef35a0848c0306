"""Orders in which two ranks seldom run by themselves: one is held in a phase until the other has come to a point."""

from __future__ import annotations

import threading

import pytest
import torch
from fault_world import SMALL_PAIR, backend_of, shm_settings

from deep_ep_py import Buffer
from deep_ep_py.errors import EPTimeoutError
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import run_threads
from deep_ep_py.testing.compare import assert_same_bits

HELD_SECONDS = 20.0


def hold(buffer, phase: str, until: threading.Event) -> None:
    def hook(now: str) -> None:
        if now == phase:
            assert until.wait(HELD_SECONDS), f"still held in {phase}"

    backend_of(buffer).set_phase_hook(hook)


def overwritten_while_pulled(comm, overwritten):
    """Rank 1's deadline passes while rank 0 sums its rows, and its user overwrites them: those sums are not returned.

    Rank 0's rows are copied, so that it waits for nobody after its sums.
    """
    rank = comm.rank
    first = Buffer(comm, settings=shm_settings())
    recv_x, _, _, _, handle, _ = v1.dispatch(first, SMALL_PAIR, rank)
    # Another buffer, so that the short deadline is that of the combine alone.
    buffer = Buffer(comm, settings=shm_settings(timeout_seconds=0.5 if rank == 1 else HELD_SECONDS))
    if rank == 1:
        y = buffer.empty(recv_x.shape, recv_x.dtype).copy_(recv_x)
        with pytest.raises(EPTimeoutError):
            buffer.combine(y, handle)
        y.fill_(99.0)
        overwritten.set()
        return
    hold(buffer, "pull", until=overwritten)
    with pytest.raises(EPTimeoutError, match="rank 1 gave this buffer up"):
        buffer.combine(recv_x.clone(), handle)


def test_rows_overwritten_after_a_deadline_are_not_summed():
    run_threads(2, overwritten_while_pulled, threading.Event())


def left_after_growth(comm, grown, done):
    """Rank 1's combine grows its heap, and it destroys its buffer at once; rank 0 maps the new memory late."""
    rank = comm.rank
    buffer = Buffer(comm, settings=shm_settings())
    recv_x, _, _, _, handle, _ = v1.dispatch(buffer, SMALL_PAIR, rank)
    num_rows, num_tokens = len(recv_x), SMALL_PAIR.num_tokens[rank]
    wide = 1 << 16
    y = torch.ones(num_rows, wide if grown == "rows" else 1)
    weights = torch.ones(num_rows, wide) if grown == "topk_weights" else None
    to = v1.layouts(SMALL_PAIR)[rank].is_token_in_rank.sum(1, keepdim=True).float()
    if rank == 0:
        hold(buffer, "notify", until=done)
    else:
        # It may not leave before rank 0 has mapped: then it waits here, and rank 0 goes on.
        backend_of(buffer).set_phase_hook(lambda now: done.set() if now == "release wait" else None)
    combined_x, combined_weights, _ = buffer.combine(y, handle, topk_weights=weights)
    buffer.destroy()
    done.set()
    assert_same_bits(combined_x, to.expand(num_tokens, y.shape[1]), "combined_x")
    assert_same_bits(combined_weights, None if weights is None else to.expand(num_tokens, wide), "combined_weights")


@pytest.mark.parametrize("grown", ["rows", "topk_weights"])
def test_new_memory_is_mapped_before_its_owner_leaves(grown):
    run_threads(2, left_after_growth, grown, threading.Event())
