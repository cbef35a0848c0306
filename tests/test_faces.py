"""What buffers are made of, what they say of themselves, and how they end."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import deep_ep_py
from deep_ep_py import (
    Buffer,
    ElasticBuffer,
    EPArgumentError,
    EPError,
    EPTimeoutError,
    Settings,
    get_physical_domain_size,
    plan,
)
from deep_ep_py.communicator import thread_world
from deep_ep_py.testing import run_processes, run_threads

SIZES = {"num_max_tokens_per_rank": 8, "hidden": 4, "num_topk": 1}


# Groups of torch ------------------------------------------------------------------------------------------------------


def pair(buffer: ElasticBuffer) -> None:
    """One token to every rank, and back."""
    x = torch.arange(buffer.num_ranks * 4.0).view(-1, 4) + 100 * buffer.rank_idx
    rows, _, _, handle, _ = buffer.dispatch(x, torch.arange(buffer.num_ranks)[:, None], num_experts=buffer.num_ranks)
    assert torch.equal(buffer.combine(rows, handle)[0], x)


def every_kind_of_group(group: dist.ProcessGroup) -> bool:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    ep = mesh["ep"]
    hint = ElasticBuffer.get_buffer_size_hint(thread_world(2)[0], 8, 4)
    ranks = dist.get_process_group_ranks(ep.get_group())
    for given, is_mesh in ((ep, True), (ep.get_group(), False), (ep.get_group().group_name, False)):
        buffer = ElasticBuffer(given, **SIZES)
        assert (buffer.num_ranks, buffer.rank_idx) == (2, ranks.index(dist.get_rank()))
        assert buffer.mesh is (given if is_mesh else None)
        assert dist.get_process_group_ranks(buffer.group) == ranks
        pair(buffer)
        buffer.destroy()
        assert buffer.group is None and buffer.mesh is None
        assert ElasticBuffer.get_buffer_size_hint(given, 8, 4) == hint
    with Buffer(mesh["dp"]) as v1:
        assert (v1.mesh, v1.group_size) == (mesh["dp"], 2)
    assert get_physical_domain_size(ep) == (1, 2)
    whole = init_device_mesh("cpu", (4,))
    with ElasticBuffer(whole, **SIZES) as buffer:
        pair(buffer)
    nameless = init_device_mesh("cpu", (2, 2))
    for face in (Buffer, ElasticBuffer):
        with pytest.raises(EPArgumentError, match=r"one dimension; pass one of them by name: mesh\['ep'\]"):
            face(mesh)
        with pytest.raises(EPArgumentError, match="mesh_dim_names"):
            face(nameless)
        with pytest.raises(EPArgumentError, match=r"group_name says: one of .*got 'no such group'"):
            face("no such group")
    part = DeviceMesh("cpu", [0, 1])
    if group.rank() > 1:
        with pytest.raises(EPArgumentError, match="that this rank is a member of"):
            ElasticBuffer(part)
    return True


@pytest.mark.processes
def test_meshes_names_and_groups() -> None:
    assert run_processes(4, every_kind_of_group) == [True] * 4


# One buffer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [Buffer, ElasticBuffer])
def test_context_copies_and_pickles(face: type[Buffer | ElasticBuffer]) -> None:
    def body(c: object) -> None:
        with face(c) as buffer:
            assert buffer.group is c and buffer.mesh is None
            assert copy.deepcopy(buffer) is buffer
            assert copy.deepcopy({"b": buffer})["b"] is buffer
            with pytest.raises(EPError, match=f"an? {face.__name__} cannot be pickled"):
                pickle.dumps(buffer)
        assert buffer.group is None
        with pytest.raises(EPError, match=r"destroyed|closed"):
            buffer.empty((1, 4), torch.float32)
        buffer.destroy()
        with pytest.raises(KeyError), face(c) as buffer:
            raise KeyError
        assert buffer.group is None

    run_threads(2, body)


def words(comm: Any) -> None:
    idx, w, x = torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2), torch.randn(2, 4)
    with Buffer(comm) as v1, ElasticBuffer(comm, **SIZES, backend="collective") as v2:
        place = f"rank {comm.rank} of 2, backend shm, device cpu, heap of {v1.statistics().heap_bytes} bytes"
        assert repr(v1) == f"<Buffer: {place}>"
        assert repr(v2) == f"<ElasticBuffer: {place.replace('shm', 'collective').split(' heap')[0]} heap of 0 bytes>"
        assert repr(v1.capture()) == "<EventOverlap: <EventHandle: done>>"
        got = v2.dispatch(x, idx, w, num_experts=2, do_expand=True, async_with_compute_stream=True)
        assert repr(got[4]) in ("<EventOverlap: <EventHandle: done>>", "<EventOverlap: <EventHandle: not done>>")
        got[4].current_stream_wait()
        assert repr(got[4]) == "<EventOverlap: <EventHandle: done>>"
        rows = (2, 4)[comm.rank]
        assert repr(got[3]) == f"<EPHandle: {rows} rows, 2 experts, expanded>"
        assert repr(v2.dispatch(x, handle=got[3], do_expand=True)[4]) == "<EventOverlap: no event>"
        planned = plan(idx, v2, 2)
        assert (
            repr(planned) == f"<PlanHandle: {planned.num_rows} rows, 1 local experts, compact, of buffer {v2.number}>"
        )

        def refused(text: str, call: Callable[[], Any]) -> None:
            with pytest.raises(EPArgumentError, match=text):
                call()

        refused("num_experts is required without a handle", lambda: v2.dispatch(x, idx, w))
        refused("topk_idx is required without a handle", lambda: v2.dispatch(x, num_experts=2))
        layout = dict(zip(("num_tokens_per_rank", "_", "num_tokens_per_expert", "is_token_in_rank"),
                          v1.get_dispatch_layout(idx, 2)[:4], strict=True))  # fmt: skip
        del layout["_"]
        for name in layout:
            given = {n: t for n, t in layout.items() if n != name}
            refused(f"{name} is required without a handle", lambda given=given: v1.dispatch(x, **given))
        refused("topk_idx: expected torch.int64 .* got None", lambda: plan(None, v2, 2))  # type: ignore[arg-type]


def test_words() -> None:
    run_threads(2, words)


def test_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEP_EP_PY_TIMEOUT_SECONDS", "7")
    (comm,) = thread_world(1)
    for given, used in ({}, 7.0), ({"num_cpu_timeout_secs": 300}, 300.0), ({"num_cpu_timeout_secs": 300.0}, 300.0):
        with ElasticBuffer(comm, **given) as buffer:
            assert buffer._engine.settings.timeout_seconds == used
    for wrong in ("x", 0, -1, float("nan")):
        with pytest.raises(EPArgumentError, match="num_cpu_timeout_secs: expected a positive number of seconds"):
            ElasticBuffer(comm, num_cpu_timeout_secs=wrong)
    with pytest.raises(EPArgumentError, match=r"to wait for every rank to construct its buffer"):
        Settings(connect_timeout_seconds=0)
    with pytest.raises(EPTimeoutError, match=r"rank 1 did not come .* connect_timeout_seconds .* construct the same"):
        ElasticBuffer(thread_world(2)[0], settings=Settings(connect_timeout_seconds=0.05))


def test_names_of_the_package() -> None:
    assert set(dir(deep_ep_py)) == {*deep_ep_py.__all__, "__version__"}
    assert all(hasattr(deep_ep_py, name) for name in dir(deep_ep_py))
    assert not {"handle", "validate", "backends", "annotations"} & set(dir(deep_ep_py))
