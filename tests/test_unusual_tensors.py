"""Tensors that are not plain, in every tensor argument of every call: read correctly, or refused on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.flop_counter import FlopCounterMode

import deep_ep_py as ep
from deep_ep_py import Buffer, ElasticBuffer, EPArgumentError
from deep_ep_py.communicator import thread_world
from deep_ep_py.testing import run_threads

T, H, E, K, R = 6, 8, 4, 2, 2


# Kinds of tensors -----------------------------------------------------------------------------------------------------


class Quiet(torch.Tensor):
    """A subclass that leaves every operation to torch."""


class Wrapper(torch.Tensor):
    """A subclass whose values are elsewhere."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def distributed(tensor: torch.Tensor) -> torch.Tensor:
    mesh = DeviceMesh("cpu", torch.arange(1), _init_backend=False, _rank=0)
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


READ = {
    "AsyncCollectiveTensor": AsyncCollectiveTensor,
    "subclass": lambda t: t.clone().as_subclass(Quiet),
    "Parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}
REFUSED = {
    "DTensor": (distributed, "to_local"),
    "FakeTensor": (lambda t: FakeTensorMode().from_tensor(t), "FakeTensorMode"),
    "sparse": (lambda t: t.to_sparse(), "to_dense"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t), layout=torch.strided), "jagged"),
    "wrapper": (Wrapper, "unwrap what the Wrapper holds"),
    "meta": (lambda t: t.to("meta"), ""),
}


# Calls, each with a function that puts an argument in the place of the plain one --------------------------------------

Put = Callable[[str, torch.Tensor], torch.Tensor]


class World:
    """One rank's buffers and what calls take."""

    def __init__(self, comm: Any, backend: str) -> None:
        self.v1, self.v2 = (
            Buffer(comm, backend=backend),
            ElasticBuffer(comm, num_max_tokens_per_rank=T, backend=backend),
        )
        random = torch.Generator().manual_seed(comm.rank)
        self.x = torch.randn(T, H, generator=random)
        self.idx = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(T)])
        self.w = torch.rand(T, K, generator=random)
        self.scaled = self.x.to(torch.int8), torch.rand(T, 2, generator=random)
        per_rank, _, per_expert, in_rank, _ = self.v1.get_dispatch_layout(self.idx, E)
        self.layout = SimpleNamespace(per_rank=per_rank, per_expert=per_expert, in_rank=in_rank)
        self.rows1, _, self.w1, _, self.handle1, _ = v1_dispatch(self, lambda _, t: t)
        self.rows, _, self.w2, self.handle, _ = self.v2.dispatch(self.x, self.idx, self.w, num_experts=E)
        self.rows, self.rows1 = self.rows.clone(), self.rows1.clone()
        self.plan = ep.plan(self.idx, self.v2, E, expand=True)
        self.expanded = ep.dispatch(self.x, None, self.plan)[0].clone()


def v1_dispatch(c: World, put: Put) -> Any:
    return c.v1.dispatch(
        put("x", c.x),
        num_tokens_per_rank=put("num_tokens_per_rank", c.layout.per_rank),
        is_token_in_rank=put("is_token_in_rank", c.layout.in_rank),
        num_tokens_per_expert=put("num_tokens_per_expert", c.layout.per_expert),
        topk_idx=put("topk_idx", c.idx),
        topk_weights=put("topk_weights", c.w),
    )


def v1_handle(c: World, put: Put) -> Any:
    prefix, channel, received, source, in_rank, heads = c.handle1
    heads, source = put("handle (send_head)", heads), put("handle (recv_src_idx)", source)
    return put("handle (rank_prefix_matrix)", prefix), channel, received, source, in_rank, heads


def v1_cached(c: World, put: Put) -> Any:
    return c.v1.dispatch(put("x", c.x), handle=v1_handle(c, put))[0]


def v1_combine(c: World, put: Put) -> Any:
    bias = put("bias", c.x), put("bias", c.x)
    return c.v1.combine(put("x", c.rows1), v1_handle(c, put), put("topk_weights", c.w1), bias)[:2]


def v2_dispatch(c: World, put: Put) -> Any:
    stats = torch.zeros(E // R, dtype=torch.int32)
    given = put("cumulative_local_expert_recv_stats", stats)
    weights = put("topk_weights", c.w)
    got = c.v2.dispatch(put("x", c.x), put("topk_idx", c.idx), weights, given, num_experts=E, do_expand=True)
    return got[0], got[2], given


def v2_scaled(c: World, put: Put) -> Any:
    return c.v2.dispatch((put("x[0]", c.scaled[0]), put("x[1]", c.scaled[1])), c.idx, None, num_experts=E)[0]


def v2_cached(c: World, put: Put) -> Any:
    weights = put("topk_weights", c.w)
    return c.v2.dispatch(put("x", c.x), put("topk_idx", c.idx), weights, handle=c.handle)[:3]


def v2_combine(c: World, put: Put) -> Any:
    return c.v2.combine(put("x", c.rows), c.handle, put("topk_weights", c.w2), put("bias", c.x))[:2]


def op_plan(c: World, put: Put) -> Any:
    return ep.plan(put("topk_idx", c.idx), c.v2, E).recv_topk_idx


def op_plan_and_dispatch(c: World, put: Put) -> Any:
    weights = put("topk_weights", c.w)
    return ep.plan_and_dispatch(put("x", c.x), put("topk_idx", c.idx), weights, c.v2, E, expand=True)[:2]


def op_dispatch(c: World, put: Put) -> Any:
    handle = c.plan._replace(packed=put("handle", c.plan.packed))
    return ep.dispatch(put("x", c.x), put("topk_weights", c.w), handle)


def op_combine(c: World, put: Put) -> Any:
    handle = c.plan._replace(packed=put("handle", c.plan.packed))
    return ep.combine(put("x", c.expanded), handle, (put("bias", c.x), put("bias", c.x)))


CALLS = [
    v1_dispatch, v1_cached, v1_combine, v2_dispatch, v2_scaled, v2_cached, v2_combine,
    op_plan, op_plan_and_dispatch, op_dispatch, op_combine,
]  # fmt: skip


def arguments_of(c: World, call: Callable[[World, Put], Any]) -> tuple[list[str], list[torch.Tensor]]:
    """The names that a call puts, and what it returns with plain tensors."""
    names: list[str] = []

    def note(name: str, tensor: torch.Tensor) -> torch.Tensor:
        names.append(name)
        return tensor

    found = results(call(c, note))
    return list(dict.fromkeys(names)), found


def results(returned: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]


def instead(name: str, make: Callable[[torch.Tensor], Any]) -> Put:
    return lambda put, tensor: make(tensor) if put == name else tensor


def each_argument(c: World) -> Iterator[tuple[Any, str, list[torch.Tensor]]]:
    for call in CALLS:
        names, plain = arguments_of(c, call)
        for name in names:
            yield call, name, plain


def every_kind(comm: Any, backend: str) -> int:
    c, arguments = World(comm, backend), 0
    for call, name, plain in each_argument(c):
        for kind, make in READ.items():
            found = results(call(c, instead(name, make)))
            assert all(map(torch.equal, found, plain)), (call.__name__, name, kind)
        for kind, (make, remedy) in REFUSED.items():
            if kind == "nested" and name != "x":
                continue
            mine = comm.rank == 1  # one rank alone passes it
            with pytest.raises(EPArgumentError) as caught:
                call(c, instead(name, make) if mine else lambda _, t: t)
            told = str(caught.value)
            assert name in told and remedy in told, (call.__name__, name, kind, told)
            assert caught.value.argument == (name if mine else ""), (call.__name__, name, kind, told)
            assert mine or caught.value.ranks == (1,)
        found = results(call(c, lambda _, t: t))
        assert all(map(torch.equal, found, plain)), (call.__name__, name)
        arguments += 1
    return arguments


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_each_argument(backend: str) -> None:
    assert run_threads(R, every_kind, backend) == [38] * R


# What is not an argument ----------------------------------------------------------------------------------------------


class Gradient(torch.autograd.Function):
    """The identity, whose gradient is of another kind."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        ctx.make = make
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.make(gradient), None


def gradients(comm: Any) -> None:
    c = World(comm, "shm")

    def train(make: Callable[[torch.Tensor], Any], *, of_combine: bool) -> torch.Tensor:
        x = c.x.clone().requires_grad_()
        rows, _ = ep.dispatch(x, None, c.plan)
        rows = rows if of_combine else Gradient.apply(rows, make)
        out = ep.combine(rows * 3, c.plan)
        (Gradient.apply(out, make) if of_combine else out).pow(2).sum().backward()
        assert x.grad is not None
        return x.grad

    for of_combine in (True, False):
        plain = train(lambda g: g, of_combine=of_combine)
        assert torch.equal(train(AsyncCollectiveTensor, of_combine=of_combine), plain)
        with pytest.raises(EPArgumentError, match="to_local"):
            train(distributed if comm.rank == 0 else lambda g: g, of_combine=of_combine)
        assert torch.equal(train(lambda g: g, of_combine=of_combine), plain)


def test_gradients() -> None:
    run_threads(R, gradients)


def layer(comm: Any) -> None:
    c = World(comm, "shm")
    for separate_plan in (False, True):
        moe = ep.nn.MoELayer(H, 4, E, K, c.v2, shared_width=4, separate_plan=separate_plan)
        plain = moe(c.x).output
        x = c.x.clone().requires_grad_()
        out = moe(AsyncCollectiveTensor(x)).output
        assert torch.equal(out, plain) and type(out) is torch.Tensor
        for make, remedy in REFUSED.values():
            with pytest.raises(EPArgumentError, match=f"x: .*{remedy}"):
                moe(make(c.x) if comm.rank == 1 else c.x)
        assert torch.equal(moe(c.x).output, plain)


def test_layer() -> None:
    run_threads(R, layer)


def modes(comm: Any, backend: str) -> None:
    """One rank calls where tensors have no memory, or under a mode that looks on."""
    c = World(comm, backend)
    plain = results(op_plan_and_dispatch(c, lambda _, t: t))
    with FlopCounterMode(display=False):
        assert all(map(torch.equal, results(op_plan_and_dispatch(c, lambda _, t: t)), plain))
        assert all(map(torch.equal, results(op_plan_and_dispatch(c, instead("x", AsyncCollectiveTensor))), plain))
        with pytest.raises(EPArgumentError, match="to_local"):
            op_plan_and_dispatch(c, instead("x", distributed) if comm.rank == 0 else lambda _, t: t)
    for call in (v1_dispatch, v1_combine, v2_dispatch, v2_combine):
        with (
            pytest.raises(EPArgumentError, match="FakeTensorMode"),
            FakeTensorMode() if comm.rank == 0 else nullcontext(),
        ):
            call(c, lambda _, t: t)
    with pytest.raises(EPArgumentError, match=r"transform of torch\.func"):
        f = lambda x: v2_dispatch(c, instead("x", lambda _: x))[0].sum()  # noqa: E731
        (torch.func.grad(f) if comm.rank == 0 else f)(c.x)
    with torch.inference_mode():
        assert all(map(torch.equal, results(op_plan_and_dispatch(c, lambda _, t: t)), plain))
        v2_dispatch(c, lambda _, t: t.clone())
    v2_dispatch(c, instead("x", lambda t: t.clone().requires_grad_()))


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_modes(backend: str) -> None:
    run_threads(R, modes, backend)


def test_views_that_do_not_lie_as_they_read() -> None:
    (comm,) = thread_world(1)
    with ElasticBuffer(comm, num_max_tokens_per_rank=T) as buffer:
        x, idx = torch.randn(T, H), torch.zeros(T, 1, dtype=torch.int64)
        lazy = torch.complex(x, x).conj().imag
        assert lazy.is_neg()
        for rows in (lazy, torch.complex(x, x).conj(), torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)):
            with pytest.raises(EPArgumentError, match=r"resolve_neg\(\).resolve_conj\(\)|int_repr"):
                buffer.dispatch(rows, idx, None, num_experts=1)
        assert torch.equal(buffer.dispatch(lazy.resolve_neg(), idx, None, num_experts=1)[0], -x)
    assert torch.equal(ep.cast_rows(AsyncCollectiveTensor(x))[0].float(), ep.cast_rows(x)[0].float())
