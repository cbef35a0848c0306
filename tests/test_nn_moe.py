"""The whole layer over ranks, against the same layer written without dispatch: outputs and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from deep_ep_py import ElasticBuffer
from deep_ep_py.nn import MoELayer, RouterConfig
from deep_ep_py.testing.worlds import run_processes, run_threads

H, WIDTH = 16, 8
V3 = RouterConfig("sigmoid", True, 2, 1, scaling_factor=2.5, sequence_loss_weight=0.1)
V3_ONE_GROUP = RouterConfig("sigmoid", True, scaling_factor=2.5)

#: (num_experts, num_topk, router, the layer's other arguments)
LAYERS = {
    "plain": (7, 2, RouterConfig(batch_loss_weight=0.1), {}),
    "deepseek-v3": (6, 2, V3, {"shared_width": 12, "expert_alignment": 8}),
    "fewer experts than ranks": (2, 1, RouterConfig(normalize=False), {"shared_width": 4, "overlap_shared": False}),
    "separate plan": (5, 3, V3_ONE_GROUP, {"separate_plan": True, "shared_width": 4}),
}
#: Sequences of each rank, and their length: rank 1 has no tokens.
SHAPES = [(2, 5), (0, 5), (1, 9), (3, 2)]


def layer_of(name: str, buffer: ElasticBuffer | None = None, dtype: torch.dtype = torch.float64) -> MoELayer:
    num_experts, num_topk, router, rest = LAYERS[name]
    layer = MoELayer(H, WIDTH, num_experts, num_topk, buffer, router=router, **rest)
    return layer.to(dtype)


def whole_layer(name: str, dtype: torch.dtype = torch.float64) -> MoELayer:
    torch.manual_seed(3)
    layer = layer_of(name, dtype=dtype)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.normal_(std=0.3)
    return layer


def inputs(num_ranks: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each rank's x and the gradient of its output."""
    torch.manual_seed(5)
    shapes = [(*SHAPES[rank], H) for rank in range(num_ranks)]
    return [(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)) for shape in shapes]


def dense(layer: MoELayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and loss of a layer that holds all experts: each expert computes each token, times the token's weight."""
    routing = layer.router(x)
    tokens = x.reshape(-1, H)
    weights = tokens.new_zeros(len(tokens), layer.router.num_experts)
    weights = weights.scatter(1, routing.topk_idx, routing.topk_weights.to(x.dtype))
    output = torch.zeros_like(tokens) if layer.shared is None else layer.shared(tokens)
    for e in layer.experts.owned:
        gate, up = F.linear(tokens, layer.experts.gate_up[e]).chunk(2, -1)
        output = output + F.linear(F.silu(gate) * up, layer.experts.down[e]) * weights[:, e, None]
    return output.reshape(x.shape), routing.aux_loss


def copy_weights(layer: MoELayer, whole: dict[str, torch.Tensor]) -> MoELayer:
    owned = slice(layer.experts.owned.start, layer.experts.owned.stop)
    own = {name: tensor[owned] if name.startswith("experts.") else tensor for name, tensor in whole.items()}
    layer.load_state_dict(own)
    return layer


def on_rank(communicator, name, dtype, weights, everyone, run, passes=1):
    """[what a pass returned and its gradients] of this rank; ``run(layer, x)`` is a forward pass."""
    x, cotangent = everyone[communicator.rank]
    buffer = ElasticBuffer(communicator, hidden=H)
    layer = copy_weights(layer_of(name, buffer, dtype), weights)
    x = x.clone().requires_grad_()
    for _ in range(passes):
        layer.zero_grad()
        x.grad = None
        output, aux_loss, load = run(layer, x)
        ((output * cotangent).sum() + aux_loss).backward()
    gradients = {key: p.grad for key, p in layer.named_parameters()}
    exchanged = buffer.statistics().rendezvous_with_counts
    buffer.destroy()
    return output.detach(), aux_loss.detach(), load, x.grad, gradients, exchanged


def over_ranks(num_ranks, name, dtype=torch.float64, run=lambda layer, x: layer(x), passes=1):
    """Over ranks and written without them: each (outputs, losses, load, gradients of inputs, of parameters).

    And how often each rank exchanged counts.
    """
    whole, everyone = whole_layer(name, dtype), inputs(num_ranks, dtype)
    ranks = run_threads(num_ranks, on_rank, name, dtype, whole.state_dict(), everyone, run, passes)
    outputs, losses, loads, x_gradients, gradients, exchanged = zip(*ranks, strict=True)
    parameters = {
        key: torch.cat([g[key] for g in gradients]) if key.startswith("experts.") else sum(g[key] for g in gradients)
        for key, _ in whole.named_parameters()
    }
    got = (outputs, losses, sum(loads), x_gradients, parameters)

    xs = [x.clone().requires_grad_() for x, _ in everyone]
    results = [dense(whole, x) for x in xs]
    sum((y * c).sum() + loss for (y, loss), (_, c) in zip(results, everyone, strict=True)).backward()
    load = sum(whole.router(x).num_tokens_per_expert for x in xs)
    expected = (
        tuple(y.detach() for y, _ in results),
        tuple(loss.detach() for _, loss in results),
        load,
        tuple(x.grad for x in xs),
        {key: p.grad for key, p in whole.named_parameters()},
    )
    return got, expected, exchanged


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_dense_layer(name, num_ranks):
    got, expected, _ = over_ranks(num_ranks, name)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-4), (torch.bfloat16, 0.05, 0.15)])
def test_equals_the_dense_layer_in_other_dtypes(dtype, rtol, atol):
    got, expected, _ = over_ranks(3, "deepseek-v3", dtype)
    assert got[0][0].dtype == dtype
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def test_full_activation_checkpointing_changes_nothing():
    got, expected, exchanged = over_ranks(3, "deepseek-v3", run=partial(checkpoint, use_reentrant=False), passes=2)
    torch.testing.assert_close(got, expected)
    assert exchanged == (4, 4, 4)


def selectively(layer, x):
    """Recomputes all but the plan, which is saved."""
    saved = partial(create_selective_checkpoint_contexts, [torch.ops.deep_ep_py.plan.default])
    return checkpoint(layer, x, use_reentrant=False, context_fn=saved)


def test_selective_activation_checkpointing_saves_the_plan():
    got, expected, exchanged = over_ranks(3, "separate plan", run=selectively, passes=2)
    torch.testing.assert_close(got, expected)
    assert exchanged == (2, 2, 2)


def test_without_grad_and_one_token_shape():
    layer = whole_layer("deepseek-v3")
    x = torch.randn(4, H, dtype=torch.float64)
    with torch.no_grad():
        output, aux_loss, load = layer(x)
        expected, expected_loss = dense(layer, x)
    torch.testing.assert_close((output, aux_loss), (expected, expected_loss))
    assert load.sum() == 8
    assert not output.requires_grad


def test_compiles_whole():
    layer, (x, cotangent) = whole_layer("deepseek-v3"), inputs(1)[0]
    x.requires_grad_()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        output, aux_loss, load = run(x)
        loss = (output * cotangent).sum() + aux_loss
        results.append((output, aux_loss, load, *torch.autograd.grad(loss, [x, *layer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


def test_autocast_computes_in_its_dtype():
    layer, (x, _) = whole_layer("deepseek-v3", torch.float32), inputs(1, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x).output
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense(layer, x)[0], rtol=0.05, atol=0.15)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def starts_of_experts(communicator, separate_plan):
    """Where the rows of each expert end, and how many rows there are."""
    buffer, seen = ElasticBuffer(communicator, hidden=H), []
    layer = MoELayer(H, WIDTH, 6, 2, buffer, expert_alignment=8, separate_plan=separate_plan)
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append((args[1].tolist(), len(args[0]))))
    layer(torch.randn(5 + communicator.rank, H))
    buffer.destroy()
    return seen


@pytest.mark.parametrize("separate_plan", [False, True])
def test_experts_rows_are_aligned(separate_plan):
    for ((ends, num_rows),) in run_threads(2, starts_of_experts, separate_plan):
        assert num_rows > 0
        assert ends[-1] == num_rows
        assert all(end % 8 == 0 for end in ends), ends


# --- processes: three steps of training, gradients and load reduced over a process group --------------------------

STEPS, SEQUENCES, LENGTH = 3, 2, 8


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(SEQUENCES, LENGTH, H, dtype=torch.float64, generator=generator)


def train(layer: MoELayer, batches, num_ranks: int = 1, group=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain gradient descent towards outputs of -x; (losses, weights)."""
    losses = []
    for x in batches:
        output, aux_loss, load = layer(x)
        loss = (output + x).square().mean() + aux_loss
        loss.backward()
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if group is not None and not name.startswith("experts."):
                    dist.all_reduce(p.grad, group=group)
                p -= 0.05 * p.grad / num_ranks
                p.grad = None
        layer.router.update_expert_bias(load, rate=0.1, group=group)
        losses.append(loss.item())
    return losses, layer.state_dict()


def train_on_rank(group, weights):
    buffer = ElasticBuffer(group, hidden=H)
    layer = layer_of("deepseek-v3", buffer)
    set_model_state_dict(layer, weights, options=StateDictOptions(full_state_dict=True))
    losses, state = train(layer, [batch(group.rank(), step) for step in range(STEPS)], group.size(), group)
    whole = {name: t.full_tensor() if name.startswith("experts.") else t for name, t in state.items()}
    buffer.destroy()
    return losses, {name: t.tolist() for name, t in whole.items()}  # shared tensors would die with the process


@pytest.mark.processes
def test_training_over_processes_equals_training_in_one():
    whole = whole_layer("deepseek-v3")
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    ranks = run_processes(2, train_on_rank, start, timeout_seconds=60)
    losses, weights = train(whole, [torch.cat([batch(rank, step) for rank in range(2)]) for step in range(STEPS)])
    assert losses[-1] < losses[0]
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(ranks[0][0], ranks[1][0], strict=True)], losses)
    for name, tensor in weights.items():
        assert not torch.equal(tensor, start[name]), name
        of_ranks = [torch.tensor(found[name], dtype=tensor.dtype) for _, found in ranks]
        torch.testing.assert_close(of_ranks, [tensor, tensor])
