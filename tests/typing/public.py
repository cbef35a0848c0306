"""What type checkers see of the public interface: checked by mypy, never run."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

import deep_ep_py as ep

Pair = tuple[torch.Tensor, torch.Tensor]


def v1(buffer: ep.Buffer, x: torch.Tensor, scaled: Pair, mesh: DeviceMesh) -> None:
    assert_type(buffer.dispatch(x)[0], torch.Tensor)
    assert_type(buffer.dispatch(scaled)[0], Pair)
    assert_type(buffer.dispatch(x)[1], torch.Tensor | None)
    assert_type(buffer.dispatch(x)[3], list[int] | None)
    assert_type(buffer.dispatch(x)[5], ep.EventOverlap)
    assert_type(buffer.combine(x, ()), tuple[torch.Tensor, torch.Tensor | None, ep.EventOverlap])
    assert_type(buffer.mesh, DeviceMesh | None)
    with ep.Buffer(mesh["ep"]) as opened:
        assert_type(opened, ep.Buffer)


def v2(buffer: ep.ElasticBuffer, x: torch.Tensor, scaled: Pair) -> None:
    assert_type(buffer.dispatch(x)[0], torch.Tensor)
    assert_type(buffer.dispatch(scaled)[0], Pair)
    handle = buffer.dispatch(x)[3]
    assert_type(handle, ep.EPHandle)
    assert_type(handle.num_recv_tokens_per_expert_list, list[int])
    assert_type(handle.psum_num_recv_tokens_per_expert, torch.Tensor)
    assert_type(buffer.combine(x, handle)[0], torch.Tensor)
    assert_type(buffer.statistics(), ep.Statistics)
    assert_type(buffer.last_traffic(), ep.Traffic | None)
    assert_type(buffer.backend_info(), ep.BackendInfo)
    with ep.ElasticBuffer("name of a group") as opened:
        assert_type(opened, ep.ElasticBuffer)


def operators(buffer: ep.ElasticBuffer, x: torch.Tensor, topk_idx: torch.Tensor) -> None:
    handle = ep.plan(topk_idx, buffer, 4)
    assert_type(handle, ep.PlanHandle)
    assert_type(ep.dispatch(x, None, handle), tuple[torch.Tensor, torch.Tensor | None])
    assert_type(ep.dispatch(x, None, handle, async_finish=True), ep.PendingDispatch)
    assert_type(ep.plan_and_dispatch(x, topk_idx, None, buffer, 4, async_finish=True), ep.PendingPlanAndDispatch)
    assert_type(ep.combine(x, handle), torch.Tensor)
    assert_type(ep.combine(x, handle, async_finish=True), ep.PendingCombine)
    assert_type(ep.get_physical_domain_size("name of a group"), tuple[int, int])
