"""This library's operations: each mode runs a dispatch and its combines, and knows how to check them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deep_ep_py import Buffer, ElasticBuffer

from .ceilings import Traffic, combine_traffic, dispatch_traffic
from .routing import Problem, all_rows
from .world import World

Samples = dict[str, list[float]]


class Mode:
    """One way to call the library. ``operations``: names, with the traffic and the bytes that SU GB/s counts."""

    def __init__(self, name: str, problem: Problem, buffer: Any, *, expand: bool = False, fp8: bool = False) -> None:
        self.name, self.problem, self.buffer, self.expand, self.fp8 = name, problem, buffer, expand, fp8
        self._copied_y: Tensor | None = None

    def operations(self) -> dict[str, tuple[Traffic, int]]:
        p, s = self.problem, self.problem.shape
        tokens, rows = p.size * s.num_tokens, p.total_rows(self.expand)
        row_bytes = s.fp8_row_bytes if self.fp8 else s.bf16_row_bytes
        # DeepEP's SU counts received tokens, in expanded mode too; the rows actually delivered are D there.
        counted = p.total_rows(False) // p.size
        found = {"dispatch": (dispatch_traffic(tokens, rows, row_bytes), counted * s.dispatch_row_bytes(self.fp8))}
        if self.fp8:
            return found
        for name in self._combines():
            traffic = combine_traffic(tokens, rows, s.bf16_row_bytes, copied=name == "combine, y copied")
            found[name] = (traffic, counted * s.combine_row_bytes())
        return found

    def _combines(self) -> tuple[str, ...]:
        return ("combine, y in place",) if self.expand else ("combine, y in place", "combine, y copied")

    def dispatch(self) -> Any:
        """(recv_x, recv_topk_idx, recv_topk_weights, handle)"""
        p = self.problem
        got = self.buffer.dispatch(
            p.fp8_x if self.fp8 else p.x,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=p.shape.num_experts,
            num_max_tokens_per_rank=p.shape.num_tokens,
            do_expand=self.expand,
            do_handle_copy=False,
        )
        return got[:4]

    def combine(self, y: Tensor, weights: Tensor, handle: Any) -> tuple[Tensor, Tensor]:
        combined, combined_weights, _ = self.buffer.combine(y, handle, topk_weights=weights)
        return combined, combined_weights

    def round(self, world: World, iterations: int) -> Samples:
        """Seconds of every call on this rank."""
        seconds, (recv_x, _, weights, handle) = world.time(self.dispatch, iterations)
        found = {"dispatch": seconds}
        if self.fp8:
            return found
        found["combine, y in place"], _ = world.time(lambda: self.combine(recv_x, weights, handle), iterations)
        if "combine, y copied" in self._combines():
            if self._copied_y is None:
                self._copied_y = recv_x.clone()
            y = self._copied_y
            found["combine, y copied"], _ = world.time(lambda: self.combine(y, weights, handle), iterations)
        return found

    def check(self) -> str:
        """Empty, or what is wrong. Collective."""
        p = self.problem
        recv_x, recv_topk_idx, recv_weights, handle = self.dispatch()
        if self.expand:
            source, token, slot = p.received_slots()
            expected_weights = torch.stack([p.weights_of(r) for r in range(p.size)])[source, token, slot]
        else:
            source, token = p.received()
            expected_weights = torch.stack([p.weights_of(r) for r in range(p.size)])[source, token]

        def same_rows(at: slice) -> bool:
            if not self.fp8:
                return torch.equal(recv_x[at], p.rows(source[at], token[at]))
            rows, sf = p.fp8_rows(source[at], token[at])
            return torch.equal(recv_x[0][at].view(torch.uint8), rows.view(torch.uint8)) and torch.equal(
                recv_x[1][at], sf
            )

        delivered = recv_x[0] if self.fp8 else recv_x
        wrong = [] if len(delivered) == len(source) and all_rows(len(source), same_rows) else ["rows or scale factors"]
        local = None if self.expand else p.local_topk(source, token)
        if local is not None and not torch.equal(recv_topk_idx, local):
            wrong.append("topk_idx")
        if not torch.equal(recv_weights, self._masked(expected_weights, local)):
            wrong.append("topk_weights")
        if not self.fp8:
            recv_x.mul_(p.scale(p.rank))
            for name in self._combines():
                y = recv_x.clone() if name == "combine, y copied" else recv_x
                wrong += [] if self._same_sums(self.combine(y, recv_weights, handle)[0]) else [name]
        return f"{self.name}: wrong {', '.join(wrong)}" if wrong else ""

    def _same_sums(self, combined: Tensor) -> bool:
        p = self.problem
        return all_rows(len(p.x), lambda at: torch.equal(combined[at], p.combined(self.expand, at)))

    def _masked(self, weights: Tensor, local: Tensor | None) -> Tensor:
        return weights


class V1Mode(Mode):
    """Layout and dispatch are timed together, as a caller of V1 needs both."""

    def dispatch(self) -> Any:
        p = self.problem
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(p.topk_idx, p.shape.num_experts)
        recv_x, recv_topk_idx, recv_weights, _, handle, _ = self.buffer.dispatch(
            p.x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
        )
        return recv_x, recv_topk_idx, recv_weights, handle

    def combine(self, y: Tensor, weights: Tensor, handle: Any) -> tuple[Tensor, Tensor]:
        combined, combined_weights, _ = self.buffer.combine(y, handle, topk_weights=weights)
        return combined, combined_weights

    def _masked(self, weights: Tensor, local: Tensor | None) -> Tensor:
        assert local is not None
        return torch.where(local >= 0, weights, 0.0)


def make_elastic(world: World, shape: Any, backend: str) -> ElasticBuffer:
    return ElasticBuffer(
        world.group,
        num_max_tokens_per_rank=shape.num_tokens,
        hidden=shape.hidden,
        num_topk=shape.num_topk,
        backend=backend,
    )


def make_modes(wanted: list[str], problem: Problem, elastic: ElasticBuffer, v1: Buffer | None) -> list[Mode]:
    """The wanted ones of v2, expand, v1 and fp8, in this order."""
    found = []
    if "v2" in wanted:
        found.append(Mode("V2 compact bf16", problem, elastic))
    if "expand" in wanted:
        found.append(Mode("V2 expanded bf16", problem, elastic, expand=True))
    if "v1" in wanted and v1 is not None:
        found.append(V1Mode("V1 bf16", problem, v1))
    if "fp8" in wanted:
        found.append(Mode("V2 compact fp8", problem, elastic, fp8=True))
    return found
