"""What ranks do in the stages of gpu_check.py that compare with the oracle."""

from __future__ import annotations

from typing import Any

import torch
from _gpu_together import Together, on_own_stream

from deep_ep_py import ElasticBuffer
from deep_ep_py.testing import Case, make_inputs
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import conformance_v2 as v2
from deep_ep_py.testing.compare import assert_same_bits

BACKEND, DEVICE = "cuda_peer", "cuda"


def cases(num_ranks: int) -> list[Any]:
    """Rows whose bytes divide by 16 and rows whose bytes do not, ranks without tokens, fp8 with scale factors."""
    tokens = (33, 20, 7, 0, 12, 31, 64, 5)[:num_ranks]
    return [
        Case(tokens, hidden=2880, num_experts=16, expert_alignment=4),
        Case(tokens, hidden=7168, num_experts=16, dtype=torch.float8_e4m3fn, sf="f32", num_scales=56),
        Case(tokens, hidden=33, num_experts=23, dtype=torch.float32, routing="distinct"),
        Case(tokens, num_topk=16, num_experts=7, routing="duplicates", expert_alignment=8),
        Case(tokens, num_topk=40, num_experts=64, hidden=7, dtype=torch.float16, gaps="elements"),
    ]


@on_own_stream
def round_trips(group: Any, few: bool) -> int:
    """Conformance on one rank; returns how many round trips it did."""
    size, done = v1.size_of(group), 0
    for at, case in enumerate(cases(size)[: 2 if few else None]):
        modes = [m for m in v2.MODES if v2.fits(case, m)]
        for mode in modes[:: 4 if few and at else 1]:
            try:
                v2.check_round_trip(group, case, mode, BACKEND)
            except Exception as e:
                raise AssertionError(f"V2 {case.id}-{mode.id}: {type(e).__name__}: {e}") from e
            done += 1
        try:
            v1.check_round_trip(group, case, BACKEND)
        except Exception as e:
            raise AssertionError(f"V1 {case.id}: {type(e).__name__}: {e}") from e
        done += 1
    return done


@on_own_stream
def few_round_trips(group: Any) -> None:
    """Small enough for a tool that makes every access hundreds of times slower."""
    case = Case((5, 3)[: v1.size_of(group)], hidden=256, num_topk=4, num_experts=6, expert_alignment=4)
    for mode in (v2.MODES[0], v2.MODES[2], v2.MODES[4]):
        v2.check_round_trip(group, case, mode, BACKEND, (1,))


@on_own_stream
def replayed(group: Any, together: Together) -> None:
    """Dispatch and combine captured once; other tokens and another routing are copied in, and it is replayed."""
    for expand in (False, True):
        replay(group, together, v2.Mode(expand=expand, sync=False))


def replay(group: Any, together: Together, mode: v2.Mode) -> None:
    """Of one mode: the first problem is captured, the others are replayed and compared with the oracle."""
    rank, size = v1.rank_of(group), v1.size_of(group)
    tokens = (33, 20, 7, 12, 0, 31, 64, 5)[:size]
    problems = [Case(tokens, hidden=512, num_experts=16, seed=seed) for seed in range(4)]
    fixed = [tensor.to(DEVICE, copy=True) for tensor in feed(problems[0], mode, rank)]
    x, topk_idx, topk_weights, y, y_weights = fixed
    buffer = ElasticBuffer(group, backend=BACKEND)
    try:

        def step() -> tuple[Any, Any]:
            got = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                num_experts=problems[0].num_experts,
                num_max_tokens_per_rank=problems[0].num_max_tokens_per_rank,
                do_expand=mode.expand,
                do_cpu_sync=False,
            )
            return got, buffer.combine(y, got[3], topk_weights=y_weights)

        for _ in range(2):  # eagerly: memory is allocated, kernels are loaded
            step()
        graph, (got, summed) = together.capture(step)
        for case in problems[1:]:
            for to, new in zip(fixed, feed(case, mode, rank), strict=True):
                to.copy_(new)
            graph.replay()
            together.synchronize()
            expected, what = v2.expected_dispatch(case, mode)[rank], f"replayed, seed {case.seed}, {mode.id}"
            v2.check_rows(got[0].cpu(), expected.recv_x, expected.row_valid, f"{what}: recv_x")
            v2.check_rows(got[2].cpu(), expected.recv_topk_weights, expected.row_valid, f"{what}: weights")
            out, out_weights = v2.expected_combine(case, mode, 0)[rank]
            assert_same_bits(summed[0].cpu(), out, f"{what}: combined_x")
            assert_same_bits(summed[1].cpu(), out_weights, f"{what}: combined_topk_weights")
        together.meet()  # nobody leaves while a peer replays
    finally:
        buffer.destroy()


def feed(case: Case, mode: v2.Mode, rank: int) -> list[torch.Tensor]:
    """x, topk_idx, topk_weights of dispatch; y and its weights of combine."""
    mine = make_inputs(case)[rank]
    return [mine.x, mine.topk_idx, mine.topk_weights, *v2.combine_inputs(case, mode, rank)]
