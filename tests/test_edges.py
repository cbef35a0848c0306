"""Input and holdings at the edge: what must be refused on every rank, and what must simply work."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from deep_ep_py import Buffer, ElasticBuffer, EPArgumentError, EPError, EPMismatchError, EventHandle, Settings
from deep_ep_py.testing import run_threads

T, H, E, K = 12, 16, 4, 2


def routing(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(T, H, generator=generator), torch.rand(T, E, generator=generator).topk(K)[1]


def bad_argument_on_rank_0(comm, backend, name, value, field):
    """Rank 0 passes a bad value; both ranks raise, and the next call works."""
    buffer = ElasticBuffer(comm, backend=backend, settings=Settings(timeout_seconds=10))
    x, idx = routing(comm.rank)
    more = {name: value} if comm.rank == 0 else {}
    with pytest.raises(EPArgumentError) as caught:
        buffer.dispatch(**{"x": x, "topk_idx": idx, "num_experts": E, **more})
    if field:
        assert field in str(caught.value)
    got = buffer.dispatch(x, idx, num_experts=E)
    assert buffer.combine(got[0], got[3])[0].shape == (T, H)
    buffer.destroy()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expert_alignment", 2**32),
        ("expert_alignment", 2**31),
        ("num_max_tokens_per_rank", 2**30),
        ("previous_event", "junk"),
        ("x", torch.empty(T, 0)),
        ("topk_idx", torch.full((T, K), 10**12)),
        ("num_experts", None),
    ],
)
def test_bad_argument_of_one_rank(backend, name, value):
    run_threads(2, bad_argument_on_rank_0, backend, name, value, name if name != "x" else "column")


def v1_expert_out_of_range(comm, backend):
    buffer = Buffer(comm, backend=backend, settings=Settings(timeout_seconds=10))
    x, idx = routing(comm.rank)
    weights = torch.ones(T, K)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    bad = idx.clone()
    if comm.rank == 0:
        bad[3, 1] = 10**12
    with pytest.raises(EPArgumentError, match="topk_idx"):
        buffer.dispatch(x, topk_idx=bad, topk_weights=weights, **layout)
    got = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout)
    at = 3 if len(got[4]) == 6 else 7  # the tokens' indices at their source
    wrong = (*got[4][:at], got[4][at][:-1], *got[4][at + 1 :])
    with pytest.raises(EPArgumentError):
        buffer.combine(got[0], wrong)
    buffer.destroy()


def test_v1_expert_out_of_range(backend):
    run_threads(2, v1_expert_out_of_range, backend)


def many_worst_case_outputs(comm, backend):
    buffer = ElasticBuffer(comm, backend=backend)
    x, idx = routing(comm.rank)
    keep = [
        buffer.dispatch(x, idx, num_experts=E, num_max_tokens_per_rank=512, do_cpu_sync=False)[0] for _ in range(300)
    ]
    assert len({k.data_ptr() for k in keep}) == 300
    buffer.destroy()


def test_many_worst_case_outputs():
    run_threads(2, many_worst_case_outputs, "shm")


def cached_above_the_limit(comm):
    buffer = ElasticBuffer(comm, backend="shm", settings=Settings(max_heap_bytes=3 << 20))
    generator = torch.Generator().manual_seed(comm.rank)
    x, idx = torch.randn(512, 1024, generator=generator), torch.rand(512, 8, generator=generator).topk(2)[1]
    first = buffer.dispatch(x, idx, num_experts=8)
    keep = [first[0]] + [buffer.dispatch(x, handle=first[3])[0] for _ in range(8)]
    assert all(torch.equal(k, first[0]) for k in keep)
    assert buffer.statistics().moved_to_ordinary_memory > 0
    buffer.destroy()


def test_cached_above_the_limit():
    run_threads(2, cached_above_the_limit)


def numpy_sizes(comm, backend):
    ElasticBuffer(comm, num_bytes=np.int64(1 << 20), num_max_tokens_per_rank=np.int64(8), backend=backend).destroy()
    buffer = Buffer(comm, np.int64(1 << 20), backend=backend)
    assert buffer.num_nvl_bytes == 1 << 20
    buffer.destroy()
    more = {"num_cpu_timeout_secs": "x"} if comm.rank == 0 else {}
    with pytest.raises((EPArgumentError, ValueError)):
        ElasticBuffer(comm, backend=backend, **more)


def test_numpy_sizes_and_a_constructor_refused_on_one_rank(backend):
    run_threads(2, numpy_sizes, backend)


def wide_elements(comm, backend):
    buffer = ElasticBuffer(comm, backend=backend)
    x, idx = routing(comm.rank)
    got = buffer.dispatch(x.to(torch.complex128), idx, num_experts=E)
    plain = buffer.dispatch(x, idx, num_experts=E)
    assert torch.equal(got[0].real.float(), plain[0])
    buffer.destroy()


def test_complex_rows(backend):
    run_threads(2, wide_elements, backend)


def background_inputs_are_let_go(comm, backend):
    buffer = ElasticBuffer(comm, backend=backend)
    x, idx = routing(comm.rank)
    mine = x.clone()
    alive = weakref.ref(mine)
    got = buffer.dispatch(mine, idx, num_experts=E, async_with_compute_stream=True)
    got[4].current_stream_wait()
    del mine, got
    buffer.dispatch(x, idx, num_experts=E)
    gc.collect()
    assert alive() is None, "a later call lets go of what a complete one used"
    buffer.destroy()


def test_background_inputs_are_let_go(backend):
    run_threads(2, background_inputs_are_let_go, backend)


def other_handle(comm, backend):
    """Two dispatches of equal counts: ranks that combine with different handles are told. Of one routing, whose plans
    are equal, either will do."""
    buffer = ElasticBuffer(comm, backend=backend, settings=Settings(timeout_seconds=10))
    x, idx = routing(comm.rank)
    first, again, second = (buffer.dispatch(x, i, num_experts=E) for i in (idx, idx, idx.flip(0)))
    with pytest.raises(EPMismatchError, match="handle"):
        buffer.combine(first[0], (first if comm.rank == 0 else second)[3])
    assert torch.equal(first[3]._plan.packed, again[3]._plan.packed)
    buffer.combine(first[0], (first if comm.rank == 0 else again)[3])
    assert buffer.combine(first[0], first[3])[0].shape == (T, H)
    buffer.destroy()


def test_other_handle(backend):
    run_threads(2, other_handle, backend)


def previous_event_failed(comm, backend):
    """An event whose operation failed is reported, not taken for complete."""
    buffer = ElasticBuffer(comm, backend=backend, settings=Settings(timeout_seconds=10))
    x, idx = routing(comm.rank)
    event = EventHandle(Failed()) if comm.rank == 0 else None
    with pytest.raises(EPError):
        buffer.dispatch(x, idx, num_experts=E, previous_event=event)
    got = buffer.dispatch(x, idx, num_experts=E)
    assert got[0].shape[1] == H
    buffer.destroy()


class Failed:
    def wait(self):
        raise EPError("it failed")

    def done(self):
        return True


def test_previous_event_that_failed(backend):
    run_threads(2, previous_event_failed, backend)
