"""One MoE layer with several exchanges: checked against each other, then timed in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deep_ep_py import ElasticBuffer
from deep_ep_py.nn import GroupedExperts, MoELayer, Router

from .moe_exchange import Arrived, Library, RowPerRank, RowPerSlot
from .world import World

#: The record's keys. IN_PLACE is a way to use this library, of the communication part alone.
OURS, IN_PLACE, PEER, TUNED = "ours", "ours_in_place", "all_to_all", "tuned_all_to_all"
_COMMUNICATION_CALLS = 3  # a round; the median counts
_CHECKED_IN_FLOAT32 = 256  # tokens a rank: products of the whole shape take long, and exchange nothing else


@dataclass(frozen=True)
class LayerShape:
    """T tokens a rank, hidden H, an expert's inner width I, E experts (a multiple of the ranks), K slots."""

    num_tokens: int
    hidden: int
    width: int
    num_experts: int
    num_topk: int
    dtype: torch.dtype


class PeerLayer(nn.Module):
    """:class:`deep_ep_py.nn.MoELayer` around another exchange: its very router and experts."""

    def __init__(self, router: Router, experts: GroupedExperts, exchange: RowPerSlot | RowPerRank) -> None:
        super().__init__()
        self.router, self.experts, self.exchange = router, experts, exchange

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights, _, _ = self.router(x)
        rows, row_weights, offsets, state = self.exchange.dispatch(x, topk_idx, topk_weights)
        return self.exchange.combine(self.experts(rows, offsets, row_weights), state)


class Layers:
    """Every contender's layer, over one set of parameters, and this rank's input and gradient of the output."""

    def __init__(self, world: World, buffer: ElasticBuffer, shape: LayerShape, seed: int) -> None:
        torch.manual_seed(seed)  # one router and one set of experts, on all ranks
        ours = MoELayer(shape.hidden, shape.width, shape.num_experts, shape.num_topk, buffer, dtype=shape.dtype)
        self.exchanges: dict[str, Library | RowPerSlot | RowPerRank] = {
            OURS: Library(buffer, shape.num_experts),
            PEER: RowPerSlot(shape.num_experts),
            TUNED: RowPerRank(shape.num_experts),
        }
        self._parameters = dict(ours.named_parameters())
        self._forward: dict[str, Callable[[Tensor], Tensor]] = {OURS: lambda x: ours(x).output}
        for name in (PEER, TUNED):
            self._forward[name] = PeerLayer(ours.router, ours.experts, self.exchanges[name])
        generator = torch.Generator().manual_seed(seed + 1 + world.rank)
        drawn = torch.randn((2, shape.num_tokens, shape.hidden), generator=generator)
        x, self._gradient = drawn.to(shape.dtype).unbind()
        self.x = x.requires_grad_()
        self.routing = tuple(t.detach() for t in ours.router(self.x)[:2])

    def step(self, name: str) -> Tensor:
        """Forward and backward; gradients are added to what is there."""
        y = self._forward[name](self.x)
        y.backward(self._gradient)
        return y

    def forget(self) -> None:
        """No gradients: an optimizer would have used them."""
        for tensor in (self.x, *self._parameters.values()):
            tensor.grad = None

    def results(self, name: str) -> dict[str, Tensor]:
        """Output and gradients of one step, by name, in float32."""
        self.forget()
        found = {"output": self.step(name).detach(), "gradient of x": self.x.grad}
        found |= {f"gradient of {parameter}": tensor.grad for parameter, tensor in self._parameters.items()}
        self.forget()
        return {what: tensor.float() for what, tensor in found.items() if tensor is not None}


def tolerance(dtype: torch.dtype) -> float:
    """How far a row may be from the peer's, over the rows' root mean square length.

    All contenders give experts equal rows in one order and sum equal rows. They differ in the order of at most K + R
    additions and, in half precision, in what is rounded on the way: a rank's partial sum, in the tuned form each
    partial sum. Each step errs by half an epsilon of its dtype at most, and a handful of steps follow one another:
    eight epsilons. What is to be found is larger by far: a row left out or put elsewhere changes a token's sum by
    about 1 / sqrt(K), and in float32, where the check runs first, any wrong value that is not tiny stands out.
    """
    return 8 * torch.finfo(dtype).eps


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest distance of two rows over the root mean square length of the expected ones; inf where shapes or
    names differ."""
    if got.keys() != expected.keys():
        return {"names of gradients": float("inf")}
    found = {}
    for what, wanted in expected.items():
        if got[what].shape != wanted.shape:
            found[what] = float("inf")
            continue
        scale = wanted.norm(dim=-1).square().mean().sqrt().item()
        worst = (got[what] - wanted).norm(dim=-1).max().item()
        found[what] = worst / scale if scale > 0 and worst == worst else float("inf")
    return found


def check_layers(world: World, layers: Layers) -> dict[str, dict[str, float]]:
    """The differences of each peer from this library's layer, this rank's; ends the run on every rank where one is
    larger than ``tolerance``."""
    expected = layers.results(OURS)
    dtype = layers.x.dtype
    allowed = tolerance(dtype)
    found, wrong = {}, []
    for name in (PEER, TUNED):
        found[name] = difference(layers.results(name), expected)
        wrong += [f"{name}, {dtype}: {what}: {d:.3g} > {allowed:.3g}" for what, d in found[name].items() if d > allowed]
    _refuse(world, wrong)
    return found


class StandIn(torch.autograd.Function):
    """Identity in the place of experts.

    Experts return a tensor of their own, and so do their gradients. So ``kept`` holds, from the first call on, a copy
    of the rows and one of their gradient, and returns those: no time is spent in between, and this library has to bring
    the rows into its heap as it has to behind real experts. ``kept`` None: the very rows that arrived. The gradient of
    the weights is the weights.
    """

    @staticmethod
    def forward(ctx, rows, row_weights, kept):
        ctx.kept, ctx.row_weights = kept, row_weights
        return rows.view_as(rows) if kept is None else _keep(kept, "rows", rows)

    @staticmethod
    def backward(ctx, gradient):
        kept = ctx.kept
        return gradient if kept is None else _keep(kept, "gradient", gradient), ctx.row_weights, None


def _keep(kept: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    if name not in kept:
        kept[name] = value.clone(memory_format=torch.contiguous_format)
    return kept[name].detach()


class Communication:
    """What lies between router and experts, and between experts and output, forward and backward."""

    def __init__(self, layers: Layers, name: str) -> None:
        self._exchange = layers.exchanges[OURS if name == IN_PLACE else name]
        self._kept: dict[str, Tensor] | None = None if name == IN_PLACE else {}
        topk_idx, weights = layers.routing
        self._topk_idx, self._weights = topk_idx, weights.clone().requires_grad_()
        # Small whole numbers: every sum of K of them is exact in every dtype and order.
        x = torch.arange(layers.x.numel()).mul_(2654435761).bitwise_right_shift_(7).remainder_(17).sub_(8)
        self._x = x.view(layers.x.shape).to(layers.x.dtype).requires_grad_()
        self._gradient = self._x.detach().flip(0)

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output, gradient of x, gradient of the weights."""
        arrived: Arrived = self._exchange.dispatch(self._x, self._topk_idx, self._weights)
        y = StandIn.apply(arrived.rows, arrived.row_weights, self._kept)
        out = self._exchange.combine(y, arrived.state)
        return out.detach(), *torch.autograd.grad(out, (self._x, self._weights), self._gradient)

    def wrong(self) -> list[str]:
        """What is not as it must be, bit for bit: each row comes back K times, and so does its gradient."""
        num_topk = self._topk_idx.shape[1]
        expected = (self._x.detach() * num_topk, self._gradient * num_topk, self._weights.detach())
        names = ("output", "gradient of x", "gradient of the weights")
        got = self.step()
        return [n for n, g, e in zip(names, got, expected, strict=True) if not torch.equal(g, e)]


def measure(world: World, shape: LayerShape, rounds: int, backend: str, seed: int) -> dict[str, Any]:
    """Check, time, and give a JSON-able record: equal on all ranks but for the differences found, which are rank 0's.

    Raises:
        SystemExit: a result is wrong; on every rank.
    """
    buffer = ElasticBuffer(
        world.group,
        num_max_tokens_per_rank=shape.num_tokens,
        hidden=shape.hidden,
        num_topk=shape.num_topk,
        backend=backend,
    )
    world.barrier = buffer.barrier
    world.progress("checking in float32")
    few = replace(shape, num_tokens=min(shape.num_tokens, _CHECKED_IN_FLOAT32), dtype=torch.float32)
    differences = {"float32": check_layers(world, Layers(world, buffer, few, seed))}
    world.progress("checking the layers that are timed")
    layers = Layers(world, buffer, shape, seed)
    differences[_name(shape.dtype)] = check_layers(world, layers)
    world.progress("checking their communication")
    parts = {name: Communication(layers, name) for name in (OURS, IN_PLACE, PEER, TUNED)}
    _refuse(world, [f"{name}, communication: {what}" for name, part in parts.items() for what in part.wrong()])

    steps: dict[str, list[float]] = {name: [] for name in layers.exchanges}
    communication: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(rounds):
        world.progress(f"round {i + 1} of {rounds}")
        for name in _turned(list(parts), i):
            seconds, _ = world.time(parts[name].step, _COMMUNICATION_CALLS)
            communication[name].append(statistics.median(world.slowest(seconds)))
        for name in _turned(list(steps), i):
            seconds, _ = world.time(partial(layers.step, name), 1)
            steps[name].append(world.slowest(seconds)[0])
            layers.forget()
    info = buffer.backend_info()
    world.barrier = torch.distributed.barrier
    buffer.destroy()
    return {
        "shape": {**vars(shape), "dtype": _name(shape.dtype)},
        "run": {
            "ranks": world.size, "threads": world.threads, "rounds": rounds, "backend": info.name,
            "refused": info.refused, "seed": seed,
        },
        "differences": differences,
        "tolerance": {name: tolerance(getattr(torch, name)) for name in differences},
        "step_ms": {name: spread([1e3 * s for s in times]) for name, times in steps.items()},
        "communication_ms": {name: spread([1e3 * s for s in times]) for name, times in communication.items()},
        # Of pairs of one round: their time over ours.
        "step_ratio": {name: _ratios(steps[name], steps[OURS]) for name in (PEER, TUNED)},
        "communication_ratio": {name: _ratios(communication[name], communication[OURS]) for name in (PEER, TUNED)},
        "communication_ratio_in_place": {
            name: _ratios(communication[name], communication[IN_PLACE]) for name in (PEER, TUNED)
        },
        "communication_share": {name: _ratios(communication[name], steps[name]) for name in steps},
    }  # fmt: skip


def _turned(names: list[str], by: int) -> list[str]:
    """Another one first in every round: what a contender leaves in the caches is not always found by the same next."""
    at = by % len(names)
    return names[at:] + names[:at]


def _refuse(world: World, errors: list[str]) -> None:
    wrong = world.agree("; ".join(errors))
    if wrong:
        raise SystemExit(f"wrong results, nothing was timed: {wrong}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ratios(theirs: list[float], ours: list[float]) -> dict[str, float]:
    return spread([t / o for t, o in zip(theirs, ours, strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
