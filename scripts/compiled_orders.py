"""Compiled exchanges against eager ones, with numbers of tokens drawn at random: run by hand, since it takes long.

    python -m torch.distributed.run --standalone --nproc-per-node 2 scripts/compiled_orders.py --runs 50

Each run draws how many tokens each rank has (0 to 4096, small numbers as often as large ones), compiles a program anew
with inductor, and compares outputs and gradients with those of the eager program. Odd runs: two layers in checkpointed
regions whose plans are saved, beside a dense part, which a compiler may reorder. Even runs: a checkpointed layer
that dispatches and combines in the background, whose rows a compiler may overwrite.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deep_ep_py as ep

MOST = 4096
SAVE_PLAN = partial(create_selective_checkpoint_contexts, [torch.ops.deep_ep_py.plan.default])


class Top1(nn.Module):
    """One expert for each token, weights applied before the dispatch, a dense layer beside it."""

    def __init__(self, hidden: int, num_experts: int, buffer: ep.ElasticBuffer) -> None:
        super().__init__()
        self.buffer, self.num_experts = buffer, num_experts
        self.norm, self.gate = nn.LayerNorm(hidden), nn.Linear(hidden, num_experts, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(num_experts, hidden)) for _ in range(2))
        self.shared = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        weights, topk_idx = self.gate(n).sigmoid().topk(1)
        plan = ep.plan(topk_idx, self.buffer, self.num_experts, expand=True)
        rows, _ = ep.dispatch(n * weights, None, plan)
        expert = plan.recv_topk_idx[:, 0]
        return x + ep.combine(torch.relu(rows * self.up[expert]) * self.down[expert], plan) + self.shared(n)


def programs(hidden: int, buffer: ep.ElasticBuffer, num_ranks: int) -> list[Any]:
    layers = [Top1(hidden, 2 * num_ranks, buffer) for _ in range(2)]
    norm = nn.LayerNorm(hidden)
    moe = ep.nn.MoELayer(hidden, 8, 4 * num_ranks, 2, buffer, shared_width=4)

    def ordered(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=SAVE_PLAN)
        return x

    def started(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: moe(norm(x)).output, x, use_reentrant=False)

    return [started, ordered]


def step(body: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = body(x)
    (out.square().sum() / MOST).backward()
    return [out.detach(), x.grad if x.grad is not None else torch.zeros_like(x)]


def difference(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if b.numel() else 0.0) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    buffer = ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=MOST, hidden=options.hidden, num_topk=2)
    # Graphs on disk are of whatever version of the operators they were compiled with.
    torch._functorch.config.enable_autograd_cache = torch._inductor.config.fx_graph_cache = False
    torch.manual_seed(options.seed)
    bodies = programs(options.hidden, buffer, num_ranks)
    draw = torch.Generator().manual_seed(options.seed)
    wrong, worst, begun = 0, 0.0, time.monotonic()
    for run in range(options.runs):
        counts = (torch.exp2(torch.rand(num_ranks, generator=draw) * 12.1).int() - 1).clamp(max=MOST).tolist()
        x = torch.randn(counts[rank], options.hidden, generator=torch.Generator().manual_seed(run * num_ranks + rank))
        body = bodies[run % 2]
        torch._dynamo.reset()
        compiled = torch.compile(body, fullgraph=True, dynamic=False)
        found = torch.tensor(difference(step(compiled, x), step(body, x)))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        wrong, worst = wrong + int(found > 1e-3), max(worst, float(found))
        if rank == 0:
            print(f"run {run}: tokens {counts}, largest relative difference {float(found):.2g}", flush=True)
    if rank == 0:
        print(
            f"torch {torch.__version__}, {num_ranks} ranks: {options.runs} compiled runs, {wrong} wrong, "
            f"largest relative difference {worst:.2g}, {time.monotonic() - begun:.0f} s"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
