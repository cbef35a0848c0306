"""Worlds for the tests of the ops: inputs of every rank from one seed, and a function of all ranks' inputs at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import deep_ep_py as ep
from deep_ep_py.testing.cases import settings_for
from deep_ep_py.testing.worlds import run_threads


@dataclass(frozen=True)
class Routing:
    """Uneven and empty ranks, slots without an expert, an expert twice in one token, an expert that nobody chooses."""

    num_tokens: tuple[int, ...] = (3, 0, 2)
    num_experts: int = 7
    num_topk: int = 2
    hidden: int = 2
    choice: str = "mixed"  # or "none": no token has an expert; "hot": one expert has all slots

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    def topk_idx(self, rank: int) -> torch.Tensor:
        if self.choice != "mixed":
            fill = -1 if self.choice == "none" else 0
            return torch.full((self.num_tokens[rank], self.num_topk), fill)
        gen = torch.Generator().manual_seed(100 + rank)
        idx = torch.randint(0, self.num_experts - 1, (self.num_tokens[rank], self.num_topk), generator=gen)
        if len(idx) > 0:
            idx[0] = idx[0, 0]  # one expert, twice
        if len(idx) > 1:
            idx[1, -1] = -1
        if len(idx) > 2:
            idx[2] = -1
        return idx

    def floats(self, rank: int, seed: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        gen = torch.Generator().manual_seed(1000 * seed + rank)
        return torch.randn(self.num_tokens[rank], columns, generator=gen, dtype=torch.float64).to(dtype)


class Board:
    """What every thread of a world says, to all of them."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._said: list[Any] = [None] * num_ranks

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._said[rank] = value
        self._barrier.wait()
        heard = list(self._said)
        self._barrier.wait()
        return heard


def gather_in_group(group: Any, value: Any) -> list[Any]:
    """The same among processes."""
    import torch.distributed as dist

    heard: list[Any] = [None] * group.size()
    dist.all_gather_object(heard, value, group=group)
    return heard


class _Own(torch.autograd.Function):
    """This rank's tensor out of all ranks'; its gradient is what that rank finds."""

    @staticmethod
    def forward(ctx, gather, rank, *all_ranks):
        ctx.gather, ctx.rank = gather, rank
        return all_ranks[rank].clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *_AllGather.apply(ctx.gather, ctx.rank, gradient)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gather, rank, own):
        ctx.gather, ctx.rank = gather, rank
        return tuple(t.detach().clone() for t in gather(own))

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, _Own.apply(ctx.gather, ctx.rank, *gradients)


def of_all_ranks(
    gather: Callable[[Any], list[Any]], rank: int, num_ranks: int, body: Callable[..., torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``body`` of every rank as one function of all ranks' inputs, [input 0 of rank 0, of rank 1, ...], that every rank
    evaluates alike: what ``gradcheck`` can check, crossings between ranks included."""

    def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = [_Own.apply(gather, rank, *inputs[i : i + num_ranks]) for i in range(0, len(inputs), num_ranks)]
        return _AllGather.apply(gather, rank, body(*own))

    return function


def threads(
    routing: Routing, body: Callable[..., Any], *args: Any, backend: str = "shm", timeout_seconds: float = 60.0
) -> list[Any]:
    """``body(rank, buffer, *args)`` on a thread per rank."""

    def rank_body(communicator: Any) -> Any:
        settings = settings_for(backend, communicator.rank, communicator.size)
        size = max(routing.num_tokens)
        buffer = ep.ElasticBuffer(communicator, num_max_tokens_per_rank=size, backend=backend, settings=settings)
        return body(communicator.rank, buffer, *args)

    return run_threads(routing.num_ranks, rank_body, timeout_seconds=timeout_seconds)


def weigh(recv_x: torch.Tensor, recv_topk_weights: torch.Tensor, expand: bool) -> torch.Tensor:
    """Rows times their weights; compact: times the sum of those of this rank's experts."""
    return recv_x * (recv_topk_weights[:, None] if expand else recv_topk_weights.sum(1, keepdim=True))


def layer(
    form: str, buffer: Any, num_experts: int, expand: bool, x: Any, topk_idx: Any, weights: Any, bias: Any, act: Any
) -> torch.Tensor:
    """``sum over slots of weight * act(x) + biases``, by each form of the ops; ``form``: words that choose it."""
    sync = "fixed" not in form
    align = {"expert_alignment": 2} if expand and "aligned" in form else {}
    go = {"async_finish": True} if "async" in form else {}
    if "plan" in form:
        handle = ep.plan(topk_idx, buffer, num_experts, expand=expand, do_cpu_sync=sync, **align)
        got = ep.dispatch(x, weights, handle, **go)
        recv_x, recv_weights = got.wait() if go else got
    else:
        call = partial(ep.plan_and_dispatch, expand=expand, do_cpu_sync=sync, **align, **go)
        got = call(x, topk_idx, weights, buffer, num_experts)
        recv_x, recv_weights, handle = got.wait() if go else got
    out = ep.combine(weigh(act(recv_x), recv_weights, expand), handle, bias=bias, **go)
    return out.wait() if go else out


def every_rank(tensors: Callable[[int], torch.Tensor], num_ranks: int) -> list[torch.Tensor]:
    return [tensors(rank).requires_grad_() for rank in range(num_ranks)]


FORMS: Sequence[str] = ("plan aligned", "one call", "plan async", "one call async aligned", "plan fixed")
