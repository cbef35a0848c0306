"""What a rank does with Megatron-Core: figures for the tests to judge."""

from __future__ import annotations

from typing import Any

import dense
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe import fused_a2a, moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from deep_ep_py import Buffer

# CUDA that Megatron itself asks for, and a name that 0.16.1 lacks without TransformerEngine.
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def checks(rank: int, num_ranks: int) -> dict[str, Any]:
    assert fused_a2a.Buffer is Buffer
    fused_a2a.set_deepep_num_sms(20)
    found: dict[str, Any] = {
        f"{case}-{dtype}-{'async' if background else 'sync'}": fused(rank, num_ranks, case, dtype, background)
        for case in dense.CASES
        for dtype in ("float32", "bfloat16")
        for background in (False, True)
    }
    found["order"] = rank_order(rank, num_ranks)
    found["layer"] = whole_layer(rank, num_ranks)
    dist.destroy_process_group()  # joins gloo's threads; see ranks.py
    return found


def fused(rank: int, num_ranks: int, case: str, dtype_name: str, background: bool) -> dict[str, Any]:
    """One layer over fused_dispatch and fused_combine: how many elements differ from the dense layer's."""
    dtype = getattr(torch, dtype_name)
    gain = dense.gains(num_ranks, dtype)
    x, topk_idx, weights, grad = dense.tokens(rank, num_ranks, case, dtype)
    x.requires_grad_(), weights.requires_grad_()
    recv_x, recv_idx, recv_weights, counts, handle = fused_a2a.fused_dispatch(
        x, topk_idx, weights, gain.shape[0], dist.group.WORLD, background, background
    )
    here = recv_idx >= 0
    mine = gain[rank * dense.LOCAL_EXPERTS :][: dense.LOCAL_EXPERTS][recv_idx.clamp(min=0)]
    y = torch.einsum("nk,nkh,nh->nh", recv_weights * here, mine.float(), recv_x.float()).to(dtype)
    combined, _ = fused_a2a.fused_combine(y, dist.group.WORLD, handle, background, background)
    combined.backward(grad)

    reference_x, reference_weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    expected = dense.layer(reference_x, topk_idx, reference_weights, gain)
    expected.backward(grad.double())
    return {
        "output": dense.unequal(combined, expected),
        "grad of x": dense.unequal(x.grad, reference_x.grad),
        "grad of weights": dense.unequal(weights.grad, reference_weights.grad),
        "counts": int((counts != torch.stack([(recv_idx == e).sum() for e in range(dense.LOCAL_EXPERTS)])).sum()),
        "dtype": str(combined.dtype),
        "tokens": x.shape[0],
        "rows": recv_x.shape[0],
    }


def rank_order(rank: int, num_ranks: int) -> list[float]:
    """One token that all ranks answer: 2**24, 1, -2**24, 1, ... added in rank order; float32 tells."""
    topk_idx = torch.arange(num_ranks).unsqueeze(0) * dense.LOCAL_EXPERTS
    x, weights = torch.ones(1, dense.HIDDEN), torch.ones(1, num_ranks)
    num_experts = num_ranks * dense.LOCAL_EXPERTS
    recv_x, _, _, _, handle = fused_a2a.fused_dispatch(x, topk_idx, weights, num_experts, dist.group.WORLD)
    answer = (2.0**24, 1.0, -(2.0**24), 1.0)[rank]
    combined, _ = fused_a2a.fused_combine(recv_x * answer, dist.group.WORLD, handle)
    return combined[0, :2].tolist()


def whole_layer(rank: int, num_ranks: int) -> dict[str, Any]:
    """Megatron's MoELayer with its flex dispatcher over deep_ep, and with its allgather dispatcher; float32."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks, create_gloo_process_groups=False)
    num_experts = 4 * num_ranks
    common = {
        "num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 64, "num_attention_heads": 4, "add_bias_linear": False,
        "gated_linear_unit": True, "activation_func": F.silu, "use_cpu_initialization": True,
        "num_moe_experts": num_experts, "moe_router_topk": 3, "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2,
        "expert_model_parallel_size": num_ranks, "moe_grouped_gemm": False,
    }  # fmt: skip
    flex = TransformerConfig(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep", **common)
    gather = TransformerConfig(moe_token_dispatcher_type="allgather", **common)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=num_experts, moe_grouped_gemm=False)
    layers = [MoELayer(config, spec.submodules.mlp.submodules) for config in (flex, gather)]
    for layer in layers:
        layer.set_layer_number(0)
        layer.train()
        with torch.no_grad():
            for number, (name, parameter) in enumerate(layer.named_parameters()):
                seed = number + (0 if name.startswith("router") else 1000 * (rank + 1))  # one router, own experts
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    figures: dict[str, Any] = {"dispatchers": [type(layer.token_dispatcher).__name__ for layer in layers]}
    for step in range(2):
        generator = torch.Generator().manual_seed(50 * step + rank)
        x, grad = (torch.randn(12, 2, 128, generator=generator) for _ in range(2))
        inputs = [x.clone().requires_grad_() for _ in layers]
        outputs = [layer(start)[0] for layer, start in zip(layers, inputs, strict=True)]
        for output in outputs:
            output.backward(grad)
        figures[f"output {step}"] = dense.worst_row(*outputs)
        figures[f"grad of x {step}"] = dense.worst_row(*(start.grad for start in inputs))
    ours, theirs = (dict(layer.named_parameters()) for layer in layers)
    figures["grads"] = {name: dense.worst_row(ours[name].grad, theirs[name].grad) for name in ours}
    return figures


def stay(rank: int, num_ranks: int) -> bool:
    """Leave with Megatron's buffer in its global, and the process group as it is."""
    fused(rank, num_ranks, "full", "bfloat16", background=True)
    return fused_a2a._buffer is not None


def destroy(rank: int, num_ranks: int) -> bool:
    """As :func:`stay`, but the process group goes first, while the buffer is still in use."""
    stay(rank, num_ranks)
    dist.destroy_process_group()
    return fused_a2a._buffer is not None
