"""A Mixture-of-Experts layer over real text, its experts spread over ranks; checked against one process.

    python examples/moe_text.py                                      # one rank
    torchrun --nproc-per-node 2 examples/moe_text.py                 # two ranks
    torchrun --nproc-per-node 2 examples/moe_text.py --path README.md --experts 64 --topk 8

Every byte of the text is a token. A rank embeds its part of the text, a router picks top-k experts for each token,
`dispatch` brings the tokens to the ranks that own these experts, the experts run, `combine` brings their weighted
outputs back and adds them. Shapes: T tokens of this rank, H hidden, E experts, K experts per token, D rows to compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deep_ep_py import ElasticBuffer

CONTEXT = 4  # bytes of text that one token sees: its own and those before it
ALIGNMENT = 8  # each expert's block of rows starts at a multiple of it, as fast matrix multiplications like it


def read_text(paths: list[Path], num_bytes: int) -> bytes:
    """The first `num_bytes` of these files, and of the text files below these folders, one after the other."""
    text = b""
    for path in paths:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            data = file.read_bytes() if len(text) < num_bytes else b""
            if file == path or b"\0" not in data:
                text += data
    return text[:num_bytes]


def seeded(purpose: int, number: int = 0) -> torch.Generator:
    """Random numbers that depend on the arguments alone, so that every rank can build the same weights."""
    return torch.Generator().manual_seed(1_000_003 * purpose + number)


def embed(text: bytes, hidden: int) -> torch.Tensor:
    """[T, H]: each byte's own vector, plus a fading trace of the bytes before it."""
    table = torch.randn(256, hidden, generator=seeded(1))
    own = table[torch.tensor(list(text), dtype=torch.int64)]
    x = own.clone()
    for back in range(1, CONTEXT):
        x[back:] += own[:-back] * 0.5**back
    return x


def route(x: torch.Tensor, num_experts: int, num_topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_idx [T, K] int64 and topk_weights [T, K] float32: sigmoid scores, the best K, normalised to sum 1."""
    router = torch.randn(x.shape[1], num_experts, generator=seeded(2)) / x.shape[1] ** 0.5
    scores, topk_idx = torch.sigmoid(x @ router).topk(num_topk, dim=1)
    return topk_idx, scores / scores.sum(dim=1, keepdim=True)


class Expert:
    """A SwiGLU expert; its weights follow from its number, whichever rank owns it."""

    def __init__(self, number: int, hidden: int) -> None:
        random, inner = seeded(3, number), 2 * hidden
        self.gate = torch.randn(hidden, inner, generator=random) / hidden**0.5
        self.up = torch.randn(hidden, inner, generator=random) / hidden**0.5
        self.down = torch.randn(inner, hidden, generator=random) / inner**0.5

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ self.gate) * (x @ self.up)) @ self.down


def own_experts(num_experts: int, rank: int, num_ranks: int) -> range:
    """The experts of a rank: in order over ranks, the first E mod R ranks own one more. As dispatch places them."""
    share, more = divmod(num_experts, num_ranks)
    first = rank * share + min(rank, more)
    return range(first, first + share + (rank < more))


def moe_layer(
    buffer: ElasticBuffer,
    experts: list[Expert],
    num_experts: int,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
) -> tuple[torch.Tensor, list[int]]:
    """The layer over all ranks: [T, H], and how many rows each local expert computed."""
    # Expanded: one row per token and slot, expert after expert, so that an expert computes one block of rows.
    recv_x, _, recv_weights, handle, _ = buffer.dispatch(
        x, topk_idx, topk_weights, num_experts=num_experts, expert_alignment=ALIGNMENT, do_expand=True
    )
    # Written into memory that the other ranks read, so that combine copies nothing.
    y = buffer.empty(recv_x.shape, recv_x.dtype)
    load = handle.num_unaligned_recv_tokens_per_expert.tolist()
    first = 0
    for expert, rows, aligned in zip(experts, load, handle.num_recv_tokens_per_expert_list, strict=True):
        block = slice(first, first + rows)
        # combine adds rows as they are: the router's weight is applied here, where the row is computed.
        torch.mul(expert(recv_x[block]), recv_weights[block, None], out=y[block])
        first += aligned  # the rows between the block's end and here are never read
    combined_x, _, _ = buffer.combine(y, handle)
    return combined_x, load


def dense_layer(num_experts: int, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The same layer without ranks: every expert computes every token, with weight 0 where it was not chosen."""
    weights = torch.zeros(x.shape[0], num_experts).scatter_(1, topk_idx, topk_weights)
    return sum((Expert(e, x.shape[1])(x) * weights[:, e, None] for e in range(num_experts)), torch.zeros_like(x))


def show(text: bytes, topk_idx: torch.Tensor, num_experts: int) -> list[str]:
    """A line of the text, and below each character the experts that were chosen for it, best first."""
    lines = [(text.index(line), line.strip()) for line in text.split(b"\n") if len(line.strip()) >= 12]
    if not lines:
        return []
    at, line = lines[len(lines) // 2]
    at, line = text.index(line, at), line[:24]
    width = len(str(num_experts - 1)) + 1
    shown = ["  text   " + "".join((chr(b) if 32 <= b < 127 else "?").rjust(width) for b in line)]
    for k, column in enumerate(topk_idx[at : at + len(line)].t().tolist()):
        shown.append(f"  slot {k} " + "".join(str(e).rjust(width) for e in column))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description="A Mixture-of-Experts layer over real text, on any number of ranks.")
    parser.add_argument("--path", type=Path, nargs="+", help="files or folders (the Python standard library's sources)")
    parser.add_argument("--tokens", type=int, default=1024, help="bytes of text for each rank (1024)")
    parser.add_argument("--hidden", type=int, default=256, help="width of a token (256)")
    parser.add_argument("--experts", type=int, default=16, help="experts, over all ranks (16)")
    parser.add_argument("--topk", type=int, default=4, help="experts per token (4)")
    parser.add_argument("--repeats", type=int, default=5, help="times that the layer runs, for the median (5)")
    args = parser.parse_args()
    if not 1 <= args.topk <= args.experts or min(args.tokens, args.hidden, args.repeats) < 1:
        parser.error("all numbers are positive, and --topk is at most --experts")

    if "RANK" in os.environ:  # torchrun set it
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))

    sources = args.path or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = read_text(sources, num_ranks * args.tokens)[rank * args.tokens :][: args.tokens]
    x = embed(text, args.hidden)
    topk_idx, topk_weights = route(x, args.experts, args.topk)
    owned = own_experts(args.experts, rank, num_ranks)
    experts = [Expert(e, args.hidden) for e in owned]

    buffer = ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=args.tokens, hidden=args.hidden, num_topk=args.topk
    )
    times = []
    for _ in range(args.repeats):
        buffer.barrier()
        start = time.perf_counter()
        y, load = moe_layer(buffer, experts, args.experts, x, topk_idx, topk_weights)
        times.append(time.perf_counter() - start)

    # Both sum the same float32 products in another order, which changes a sum of n terms by about sqrt(n) times
    # float32's epsilon; an output sums 2H terms that are sums of H. A wrong row is off by about its own size.
    expected = dense_layer(args.experts, x, topk_idx, topk_weights)
    scale = expected.abs().max().item() if len(text) else 0.0
    tolerance = torch.finfo(torch.float32).eps * (3 * args.hidden) ** 0.5 * scale
    error = (y - expected).abs().max().item() if len(text) else 0.0
    right = error <= tolerance  # also False where the error is not a number

    verdict = "equal" if right else "DIFFERENT"
    speed = len(text) / statistics.median(times)
    report = [
        f"rank {rank} of {num_ranks} ({buffer.backend_info().name}): {len(text)} tokens, {speed:,.0f} tokens/s",
        *show(text, topk_idx, args.experts),
        f"  load of experts {owned.start}..{owned.stop - 1}: {load}",
        f"  {verdict}: largest error {error:.1e}, tolerance {tolerance:.1e}, outputs up to {scale:.1f}",
    ]
    everyone: list[tuple[bool, list[str]]] = [(True, [])] * num_ranks
    dist.all_gather_object(everyone, (right, report))
    if rank == 0:
        print("\n".join(line for _, lines in everyone for line in lines), flush=True)
    buffer.destroy()
    dist.destroy_process_group()
    return 0 if all(ok for ok, _ in everyone) else 1


if __name__ == "__main__":
    sys.exit(main())
