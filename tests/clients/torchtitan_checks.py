"""What a rank does with torchtitan: figures for the tests to judge."""

from __future__ import annotations

from typing import Any

import dense
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.deepep import deepep
from torchtitan.models.common.token_dispatcher import DeepEPTokenDispatcher

from deep_ep_py import ElasticBuffer

# torchtitan registers its operators for CUDA only: the same functions, for CPU tensors too.
deepep._lib.impl("dispatch", deepep._dispatch_op_impl, "CPU")
deepep._lib.impl("combine", deepep._combine_op_impl, "CPU")

CAPACITY = 64


def checks(rank: int, num_ranks: int) -> dict[str, Any]:
    assert deepep.ElasticBuffer is ElasticBuffer
    deepep.get_buffer(dist.group.WORLD, hidden=dense.HIDDEN, num_max_tokens_per_rank=CAPACITY, num_topk=dense.NUM_TOPK)
    cases = [(case, dtype) for case in dense.CASES for dtype in ("float32", "bfloat16")]
    found: dict[str, Any] = {
        f"functions-{case}-{dtype}": functions(rank, num_ranks, case, dtype) for case, dtype in cases
    }
    found |= {f"class-{case}-{dtype}": dispatcher_class(rank, num_ranks, case, dtype) for case, dtype in cases}
    dist.destroy_process_group()  # joins gloo's threads; see ranks.py
    return found


def problem(rank: int, num_ranks: int, case: str, dtype_name: str) -> tuple[torch.Tensor, ...]:
    """x, topk_idx, weights, gradient and gains. torchtitan drops a slot by a weight of 0, not by an id of -1."""
    dtype = getattr(torch, dtype_name)
    x, topk_idx, weights, grad = dense.tokens(rank, num_ranks, case, dtype, seed=1)
    dropped = topk_idx < 0
    return x, topk_idx.masked_fill(dropped, 0), weights.masked_fill(dropped, 0), grad, dense.gains(num_ranks, dtype)


def experts(rows: torch.Tensor, counts: torch.Tensor, gain: torch.Tensor, rank: int) -> torch.Tensor:
    """Expert-major rows times their expert's gains; rows past the counts, whose content is undefined, give zeros."""
    mine = gain[rank * dense.LOCAL_EXPERTS :][: dense.LOCAL_EXPERTS]
    used = int(counts.sum())
    y = rows[:used] * mine.repeat_interleave(counts.long(), dim=0)
    return torch.cat([y, rows.new_zeros(rows.shape[0] - used, rows.shape[1])])


def judge(x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor, gain: torch.Tensor,
          trained: torch.Tensor, inferred: torch.Tensor) -> dict[str, Any]:  # fmt: skip
    """How many elements of the outputs and of the gradients differ from the dense layer's."""
    reference_x, reference_weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    expected = dense.layer(reference_x, topk_idx, reference_weights, gain)
    expected.backward(grad.double())
    kept = weights.detach() != 0  # no gradient comes back for a slot that was not sent
    return {
        "training": dense.unequal(trained, expected),
        "inference": dense.unequal(inferred, expected),
        "grad of x": dense.unequal(x.grad, reference_x.grad),
        "grad of weights": dense.unequal(weights.grad * kept, reference_weights.grad * kept),
        "kept handles": len(deepep._handle_cache),
        "dtype": str(trained.dtype),
        "tokens": x.shape[0],
    }


def functions(rank: int, num_ranks: int, case: str, dtype: str) -> dict[str, Any]:
    """torchtitan's dispatch_tokens and combine_tokens: compact under grad, expanded without."""
    x, topk_idx, weights, grad, gain = problem(rank, num_ranks, case, dtype)
    x.requires_grad_(), weights.requires_grad_()

    def forward(cudagraphable: bool) -> tuple[torch.Tensor, torch.Tensor]:
        rows, counts, state = deepep.dispatch_tokens(
            x, topk_idx, weights, dense.LOCAL_EXPERTS, gain.shape[0],
            num_tokens_per_rank=CAPACITY, cudagraphable=cudagraphable,
        )  # fmt: skip
        combined = deepep.combine_tokens(experts(rows, counts, gain, rank), state)
        deepep.sync_combine()
        return combined, counts

    trained, counts = forward(cudagraphable=False)
    trained.backward(grad)
    with torch.no_grad():
        inferred, static_counts = forward(cudagraphable=True)
    found = judge(x, topk_idx, weights, grad, gain, trained, inferred)
    return {**found, "counts": int((counts != static_counts).sum()), "rows": int(counts.sum())}


def dispatcher_class(rank: int, num_ranks: int, case: str, dtype: str) -> dict[str, Any]:
    """torchtitan's DeepEPTokenDispatcher, which wants equally many tokens on every rank."""
    rank_of_tokens = 0 if case == "empty" else rank
    x, topk_idx, weights, grad, gain = problem(rank_of_tokens, num_ranks, case, dtype)
    x, topk_idx, weights, grad = (t[:20].contiguous() for t in (x, topk_idx, weights, grad))
    x.requires_grad_(), weights.requires_grad_()
    mesh = init_device_mesh("cpu", (num_ranks,))

    def forward(cudagraphable: bool) -> torch.Tensor:
        config = DeepEPTokenDispatcher.Config(
            num_experts=gain.shape[0], top_k=dense.NUM_TOPK, num_max_tokens_per_rank=CAPACITY,
            hidden_dim=dense.HIDDEN, cudagraphable=cudagraphable,
        )  # fmt: skip
        dispatcher = DeepEPTokenDispatcher(config)
        dispatcher.wire_meshes(ep_mesh=mesh)
        rows, counts, metadata = dispatcher.dispatch(x, weights, topk_idx, None)
        return dispatcher.combine(experts(rows, counts, gain, rank), metadata, x)

    trained = forward(cudagraphable=False)
    trained.backward(grad)
    with torch.no_grad():
        inferred = forward(cudagraphable=True)
    return judge(x, topk_idx, weights, grad, gain, trained, inferred)


def stay(rank: int, num_ranks: int) -> bool:
    """Leave with torchtitan's buffer in its global, and the process group as it is."""
    deepep.get_buffer(dist.group.WORLD, hidden=dense.HIDDEN, num_max_tokens_per_rank=CAPACITY, num_topk=dense.NUM_TOPK)
    functions(rank, num_ranks, "full", "bfloat16")
    return deepep._buffer is not None


def destroy(rank: int, num_ranks: int) -> bool:
    """As :func:`stay`, but the process group goes first, while the buffer is still in use."""
    stay(rank, num_ranks)
    dist.destroy_process_group()
    return deepep._buffer is not None


def unfinished(rank: int, num_ranks: int) -> bool:
    """Leave in the middle: a combine that nobody waited for, handles and graph of a backward pass that never ran."""
    deepep.get_buffer(dist.group.WORLD, hidden=dense.HIDDEN, num_max_tokens_per_rank=CAPACITY, num_topk=dense.NUM_TOPK)
    x, topk_idx, weights, _, gain = problem(rank, num_ranks, "full", "float32")
    rows, counts, state = deepep.dispatch_tokens(
        x.requires_grad_(), topk_idx, weights, dense.LOCAL_EXPERTS, gain.shape[0], num_tokens_per_rank=CAPACITY
    )
    deepep.kept_by_the_client = deepep.combine_tokens(experts(rows, counts, gain, rank), state)
    return deepep._pending_combine_event is not None
