"""Two hops for tensors on a GPU: on their way across domains rows pass through host memory, where the hops are.

A call copies its tensors to the host, runs there, and copies what it delivers back; the host waits for each. Where the
link between hosts is slower than the bus to the host this costs little, and a row crosses once for each domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..event import CompletionEvent
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec
from ._hop_dispatch import Begun
from ._routing import on_host
from .hybrid import HybridBackend


@dataclass(slots=True)
class _Staged:
    """A dispatch that was begun on the host, and what it is to deliver on the device."""

    begun: Begun
    result: Dispatched


class StagedHybridBackend(HybridBackend):
    """See the module."""

    def _begin_dispatch(self, spec: DispatchSpec, previous: Sequence[CompletionEvent]) -> Any:
        for event in previous:
            event.wait()
        begun = super()._begin_dispatch(_to_host(spec), ())
        host = begun.result
        plan, counts = spec.plan, None
        if plan is None:
            plan = host.plan._replace(packed=host.plan.packed.to(self.device))
            counts = host.plan.expert_counts.tolist()
        recv_x = _like(host.recv_x, self.device)
        assert recv_x is not None
        sf, idx, weights = (_like(t, self.device) for t in (host.recv_sf, host.recv_topk_idx, host.recv_topk_weights))
        meta = _like(host.recv_meta, self.device)
        return _Staged(begun, Dispatched(recv_x, sf, idx, weights, meta, plan, counts))

    def _deliver(self, begun: Any) -> None:
        super()._deliver(begun.begun)
        _copy(begun.begun.result, begun.result)

    def _outputs(self, spec: CombineSpec) -> Combined:
        num_tokens, y, weights = spec.plan.num_tokens, spec.y, spec.weights
        combined = torch.empty((num_tokens, y.shape[1]), dtype=y.dtype, device=self.device)
        if weights is None:
            return Combined(combined, None)
        columns = weights.shape[1] if spec.plan.layout == "rank" else spec.plan.num_slots
        return Combined(combined, torch.empty((num_tokens, columns), dtype=weights.dtype, device=self.device))

    def _combine(self, spec: CombineSpec, previous: Sequence[CompletionEvent], result: Combined) -> None:
        for event in previous:
            event.wait()
        here = replace(_to_host(spec), bias=tuple(b.cpu() for b in spec.bias))
        host = super()._outputs(here)
        super()._combine(here, (), host)
        _copy(host, result)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


def _to_host(spec: Any) -> Any:
    """The same operation with its tensors, and its plan, on the host."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    moved = {name: value.cpu() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(spec, plan=None if spec.plan is None else on_host(spec.plan), **moved)


def _like(host: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    if host is None:
        return None
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


def _copy(host: Any, device: Any) -> None:
    """Every tensor that the operation filled."""
    for field in fields(host):
        tensor = getattr(host, field.name)
        if isinstance(tensor, torch.Tensor):
            getattr(device, field.name).copy_(tensor)
