"""How fast is it? Stages of gpu_check.py: python _gpu_timings.py <stage> <result file> <architecture>"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _gpu_report import floor_seconds, moved_bytes
from _gpu_stages import Skipped, main, write_result
from _gpu_together import NotCaptured, Together, on_own_stream

BACKEND, DEVICE = "cuda_peer", "cuda"
RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 8, 4096, 7168, 256, 8
SWEEP = (1, 2, 4, 6, 8, 12, 16, 24)
CALLS = 4  # operations of one graph
NCCL_SHARES = (2, 30)  # from here on several ranks may share a GPU


class Problem:
    """One rank's tokens. x holds small integers, so that sums of rows are exact in bfloat16."""

    def __init__(self, rank: int, num_ranks: int, tokens: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(rank)
        random = {"generator": generator, "device": DEVICE}
        self.x = torch.randint(-8, 9, (tokens, HIDDEN), **random).to(torch.bfloat16)
        self.topk_idx = torch.rand((tokens, EXPERTS), **random).topk(TOPK).indices.contiguous()
        self.topk_weights = torch.rand((tokens, TOPK), **random)
        owners = self.topk_idx // (EXPERTS // num_ranks)
        self.copies = torch.nn.functional.one_hot(owners, num_ranks).amax(1).sum(1)  # [T] ranks that get each token
        self.tokens = tokens

    def dispatch(self, buffer: Any, expand: bool = False, **options: Any) -> Any:
        routing = {
            "topk_idx": self.topk_idx,
            "num_experts": EXPERTS,
            "num_max_tokens_per_rank": self.tokens,
            "do_handle_copy": False,
        }
        if "handle" in options:
            return buffer.dispatch(self.x, do_expand=expand, **options)
        return buffer.dispatch(self.x, topk_weights=self.topk_weights, do_expand=expand, **routing, **options)

    def check(self, summed: torch.Tensor, expand: bool) -> None:
        factor = TOPK if expand else self.copies[:, None]
        if not torch.equal(summed, (self.x.float() * factor).to(torch.bfloat16)):
            raise AssertionError(f"combine of a {'expanded' if expand else 'compact'} dispatch is wrong: not timed")


def copy_rate() -> tuple[float, int]:
    """(bytes per second that one large copy reads and writes, bytes copied)"""
    size = min(1 << 30, torch.cuda.get_device_properties(0).total_memory // 8)
    a, b = (torch.empty(size, dtype=torch.uint8, device="cuda").fill_(i) for i in range(2))
    together = Together(1)
    seconds = together.milliseconds(lambda: b.copy_(a), steps=10) / 1e3
    return 2 * size / seconds, size


@on_own_stream
def time_operations(group: Any, together: Together, data: dict[str, Any], keep: Callable[[], None]) -> None:
    """At RANKS ranks: every operation against its floor, then the sweep of SMs."""
    from deep_ep_py import ElasticBuffer

    rank = group.rank
    problem = Problem(rank, RANKS, TOKENS)
    buffer = ElasticBuffer(group, backend=BACKEND, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK)

    def measured(step: Callable[[], Any]) -> tuple[float, str]:
        """(ms of one operation, how). A graph takes Python out of it; it must not take the timing with it."""
        step()
        try:
            graph, _ = together.capture(step, CALLS)
        except NotCaptured:
            return together.milliseconds(step, CALLS), "eager, for it could not be captured"
        ms = together.milliseconds(graph.replay, 5) / CALLS
        together.meet()  # no graph is dropped while a peer's runs
        return ms, "graph"

    for expand in (False, True):
        kind = "expanded" if expand else "compact"
        recv_x, _, _, handle, _ = problem.dispatch(buffer, expand)
        problem.check(buffer.combine(recv_x, handle)[0], expand)
        rows = sum_over(together, data, rank, len(recv_x))
        steps: dict[str, Callable[..., Any]] = {
            "dispatch": lambda e=expand, h=handle, **o: problem.dispatch(buffer, e, handle=h, **o),
            "combine": lambda y=recv_x, h=handle, **o: buffer.combine(y, h, **o),
        }
        for name, step in steps.items():
            ms, how = measured(step)
            note(data, rank, keep, kind, name, f"handle, {how}", ms, rows)
        ms = together.milliseconds(lambda e=expand: problem.dispatch(buffer, e), CALLS)
        note(data, rank, keep, kind, "dispatch", "counts on the host, eager", ms, rows)
        if not expand:
            for name, step in steps.items():
                for sms in SWEEP:
                    ms, _ = measured(lambda s=step, n=sms: s(num_sms=n))
                    if rank == 0:
                        data["sweeps"].setdefault(name, {})[str(sms)] = ms
                        keep()
        del recv_x, handle, steps
    together.synchronize()
    together.meet()
    buffer.destroy()


def sum_over(together: Together, data: dict[str, Any], rank: int, rows: int) -> int:
    """Received rows of all ranks."""
    data["rows"][rank] = rows
    together.meet()
    total = sum(data["rows"].values())
    together.meet()
    return total


def note(
    data: dict[str, Any], rank: int, keep: Callable[[], None], kind: str, name: str, how: str, ms: float, rows: int
) -> None:
    if rank == 0:
        floor = floor_seconds(moved_bytes(name, RANKS * TOKENS, rows, 2 * HIDDEN), data["copy_gb_per_s"] * 1e9) * 1e3
        cell = {"name": f"{kind}: {name}", "how": how, "ms": ms, "floor_ms": floor, "percent": 100 * floor / ms}
        data["operations"].append(cell)
        keep()


@on_own_stream
def time_pair(group: Any, together: Together, data: dict[str, Any], keep: Callable[[], None], tokens: int) -> None:
    """Dispatch and combine of few tokens: without a host's wait, captured; and as called."""
    from deep_ep_py import ElasticBuffer
    from deep_ep_py.testing.conformance_v1 import size_of

    rank, num_ranks = group.rank, size_of(group)
    problem = Problem(rank, num_ranks, tokens)
    buffer = ElasticBuffer(group, backend=BACKEND, num_max_tokens_per_rank=tokens, hidden=HIDDEN, num_topk=TOPK)

    def pair(**options: Any) -> torch.Tensor:
        recv_x, _, _, handle, _ = problem.dispatch(buffer, **options)
        return buffer.combine(recv_x, handle)[0]

    problem.check(pair(), expand=False)
    found = {"as called": together.milliseconds(pair, 20)}
    pair(do_cpu_sync=False)
    graph, out = together.capture(lambda: pair(do_cpu_sync=False))
    found["graph"] = together.milliseconds(graph.replay, 20)
    problem.check(out, expand=False)
    if rank == 0:
        data["pairs"] += [{"ranks": num_ranks, "tokens": tokens, "how": h, "us": 1e3 * ms} for h, ms in found.items()]
        keep()
    together.meet()
    del graph, out
    buffer.destroy()


def timings(result: Path, architecture: str) -> dict[str, Any]:
    from deep_ep_py.testing import run_threads

    rate, size = copy_rate()
    shape = {"ranks": RANKS, "tokens": TOKENS, "hidden": HIDDEN, "experts": EXPERTS, "topk": TOPK}
    data: dict[str, Any] = {"copy_gb_per_s": rate / 1e9, "copy_mib": size >> 20, "shape": shape}
    data.update(operations=[], sweeps={}, pairs=[], rows={})

    def keep() -> None:
        write_result(result, "failed", "not done", **data)

    keep()
    torch.cuda.empty_cache()
    for num_ranks in (2, RANKS):
        run_threads(num_ranks, time_pair, Together(num_ranks), data, keep, 128, timeout_seconds=40)
    run_threads(RANKS, time_operations, Together(RANKS), data, keep, timeout_seconds=100)
    return data


def exchange(group: Any, num_ranks: int, rows: int) -> float:
    """Seconds of one all_to_all_single of ``rows`` rows from every rank to every rank; each rank in its process."""
    import torch.distributed as dist

    rank = group.rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    nccl = dist.new_group(backend="nccl")
    give, take = (torch.zeros((num_ranks * rows, HIDDEN), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    took = []
    for _ in range(12):
        torch.cuda.synchronize()
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_to_all_single(take, give, group=nccl)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    dist.destroy_process_group(nccl)
    return statistics.median(took[2:])


def nccl(result: Path, architecture: str) -> dict[str, Any]:
    from deep_ep_py.testing import run_processes

    if not torch.distributed.is_nccl_available():
        raise Skipped("torch has no NCCL")
    devices, version = torch.cuda.device_count(), torch.cuda.nccl.version()
    if version < NCCL_SHARES and devices < 2:
        raise Skipped(f"one GPU, and NCCL {'.'.join(map(str, version))}: ranks share a GPU from 2.30 on")
    ranks = RANKS if version >= NCCL_SHARES else min(devices, RANKS)
    rows = round(TOKENS * (1 - (1 - 1 / ranks) ** TOPK))  # tokens that have at least one of their experts on a rank
    seconds = max(run_processes(ranks, exchange, ranks, rows, timeout_seconds=50))
    return {"ranks": ranks, "devices": devices, "bytes": ranks * ranks * rows * 2 * HIDDEN, "ms": 1e3 * seconds}


if __name__ == "__main__":
    sys.exit(main({"timings": timings, "nccl": nccl}, sys.argv[1:]))
