"""What conformance does not reach: asynchronous calls and memory that is used again, rows in place, gradients, a layer,
fp8. Rows are small whole numbers, whose sums are exact."""

from __future__ import annotations

from typing import Any

import torch
from _gpu_together import on_own_stream

from deep_ep_py import ElasticBuffer, cast_rows, combine, plan_and_dispatch
from deep_ep_py.nn import MoELayer
from deep_ep_py.testing import conformance_v1 as v1

BACKEND, DEVICE = "cuda_peer", "cuda"
EXPERTS, TOPK, HIDDEN = 24, 3, 256


@on_own_stream
def faces(group: Any) -> None:
    buffer = ElasticBuffer(group, backend=BACKEND)
    try:
        rank = v1.rank_of(group)
        asynchronous(buffer, rank)
        differentiable(buffer, rank)
        layer(buffer, rank)
        quantised()
        buffer.barrier(with_cpu_sync=True)
    finally:
        buffer.destroy()


def problem(buffer: Any, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H] float32, topk_idx [T, K], and how many ranks each token is sent to [T, 1]."""
    seeded = torch.Generator().manual_seed(1000 * seed + rank)
    num_tokens = int(torch.randint(0, 200, (), generator=seeded))
    x = torch.randint(-4, 5, (num_tokens, HIDDEN), generator=seeded).float()
    topk_idx = torch.rand(num_tokens, EXPERTS, generator=seeded).topk(TOPK).indices
    owner = topk_idx // (EXPERTS // buffer.num_ranks)
    times = torch.stack([(owner == r).any(1) for r in range(buffer.num_ranks)]).sum(0)[:, None]
    return x.to(DEVICE), topk_idx.to(DEVICE), times.to(DEVICE)


def asynchronous(buffer: Any, rank: int) -> None:
    """Nothing is waited for on the host between rounds, and every round's tensors are dropped: memory that is given out
    again while somebody still uses it shows as a wrong sum."""
    outcomes = []
    for seed in range(30):
        x, topk_idx, times = problem(buffer, rank, seed)
        own = {"async_with_compute_stream": True, "allocate_on_comm_stream": seed % 3 == 0}
        recv_x, _, _, handle, event = buffer.dispatch(
            x, topk_idx, num_experts=EXPERTS, num_max_tokens_per_rank=200, do_cpu_sync=seed % 2 == 0,
            previous_event=buffer.capture(), **own,
        )  # fmt: skip
        event.current_stream_wait()
        y = recv_x.mul_(2) if seed % 4 else buffer.empty(recv_x.shape, recv_x.dtype).copy_(recv_x).mul_(2)
        combined, _, event = buffer.combine(y, handle, previous_event=buffer.capture(), **own)
        event.current_stream_wait()
        outcomes.append((combined == 2 * times * x).all())
    assert all(bool(right) for right in outcomes), [seed for seed, right in enumerate(outcomes) if not right]


def differentiable(buffer: Any, rank: int) -> None:
    for expand in (False, True):
        x, topk_idx, times = problem(buffer, rank, 77)
        x.requires_grad_()
        recv_x, _, handle = plan_and_dispatch(
            x, topk_idx, None, buffer, EXPERTS, expand=expand, num_max_tokens_per_rank=200
        )
        out = combine(3 * recv_x, handle)
        (out * x.detach()).sum().backward()
        copies = TOPK if expand else times
        assert torch.equal(out.detach(), 3 * copies * x.detach())
        assert torch.equal(x.grad, 3 * copies * x.detach())


def layer(buffer: Any, rank: int) -> None:
    torch.manual_seed(rank)
    made = MoELayer(HIDDEN, 128, EXPERTS, TOPK, buffer).to(DEVICE)
    x = torch.randn(64, HIDDEN, device=DEVICE, requires_grad=True)
    y, aux_loss, _ = made(x)
    (y.square().mean() + aux_loss).backward()
    for gradient in (x.grad, *(p.grad for p in made.parameters())):
        assert gradient is not None and bool(gradient.isfinite().all())


def quantised() -> None:
    x = torch.randn(100, 7168, generator=torch.Generator().manual_seed(1)).bfloat16()
    for channels in (128, None):
        here, there = cast_rows(x, channels=channels), cast_rows(x.to(DEVICE), channels=channels)
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8)), f"fp8 rows, {channels} channels"
