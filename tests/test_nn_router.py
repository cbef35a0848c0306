"""The router, against the papers' formulas written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deep_ep_py import EPArgumentError
from deep_ep_py.nn import Router, RouterConfig

H, E, K = 5, 12, 3

CONFIGS = {
    "softmax": RouterConfig(),
    "mixtral-like": RouterConfig(batch_loss_weight=0.3),
    "raw": RouterConfig(normalize=False, scaling_factor=1.7),
    "deepseek-v2": RouterConfig("softmax", False, 4, 2, normalize=False, scaling_factor=16.0, sequence_loss_weight=0.2),
    "deepseek-v3": RouterConfig("sigmoid", True, 4, 2, scaling_factor=2.5, sequence_loss_weight=0.2),
    "one expert a group": RouterConfig("sigmoid", True, E, 4),
    "everything": RouterConfig(
        "sigmoid", True, 3, 2, scaling_factor=0.5, batch_loss_weight=0.3, sequence_loss_weight=0.7
    ),
}


def router_of(config: RouterConfig, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    router = Router(H, E, K, config).double()
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.5)
    return router


def best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())[:count]


def written_out(x, weight, bias, config):
    """idx and weights [T][K], load [E], loss; x [B, S, H]."""
    idx, weights, load = [], [], torch.zeros(E, dtype=torch.int64)
    top, shares = [], []
    for token in x.flatten(0, 1):
        logits = torch.stack([(token * row).sum() for row in weight])
        softmax = config.score_function == "softmax"
        scores = logits.exp() / logits.exp().sum() if softmax else 1 / (1 + (-logits).exp())
        corrected = scores.detach() + (0 if bias is None else bias)
        size = E // config.num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
        counted = 1 if softmax else 2
        value = torch.stack([corrected[g].sort(descending=True).values[:counted].sum() for g in groups])
        eligible = [e for g in best(value, config.topk_groups) for e in groups[g]]
        chosen = [eligible[i] for i in best(corrected[eligible], K)]
        w = scores[chosen]
        w = w / w.sum() if config.normalize else w
        idx.append(chosen)
        weights.append(w * config.scaling_factor)
        load[chosen] += 1
        top.append(best(scores, K))
        shares.append(scores / scores.sum())

    def loss(tokens):
        f = [sum(e in top[t] for t in tokens) * E / (K * len(tokens)) for e in range(E)]
        p = torch.stack([shares[t] for t in tokens]).mean(0)
        return sum(f[e] * p[e] for e in range(E))

    B, S = x.shape[:2]
    losses = config.batch_loss_weight * loss(range(B * S))
    losses = losses + config.sequence_loss_weight * sum(loss(range(b * S, b * S + S)) for b in range(B)) / B
    return idx, torch.stack(weights), load, losses


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_formulas(name):
    config = CONFIGS[name]
    router = router_of(config)
    x = torch.randn(3, 7, H, dtype=torch.float64, requires_grad=True)
    got = router(x)
    idx, weights, load, loss = written_out(x, router.weight, router.expert_bias, config)
    assert got.topk_idx.tolist() == idx
    assert got.num_tokens_per_expert.tolist() == load.tolist()
    torch.testing.assert_close(got.topk_weights, weights)
    torch.testing.assert_close(got.aux_loss, loss)

    cotangent = torch.randn_like(weights)
    ours = torch.autograd.grad((got.topk_weights * cotangent).sum() + got.aux_loss, [x, router.weight])
    theirs = torch.autograd.grad((weights * cotangent).sum() + loss, [x, router.weight])
    torch.testing.assert_close(ours, theirs)


def gate_of_logits(config: RouterConfig, num_experts: int, num_topk: int) -> Router:
    """A router whose logits are its input."""
    router = Router(num_experts, num_experts, num_topk, config)
    torch.nn.init.eye_(router.weight)
    return router


def test_the_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    router = gate_of_logits(RouterConfig("sigmoid", True, normalize=False), 4, 2)
    before = router(logits)
    assert before.topk_idx.tolist() == [[0, 1]]
    router.expert_bias += torch.tensor([0.0, 0.0, 0.0, 5.0])
    after = router(logits)
    assert after.topk_idx.tolist() == [[3, 0]]
    torch.testing.assert_close(after.topk_weights, torch.tensor([[-1.0, 2.0]]).sigmoid())
    assert "expert_bias" not in dict(router.named_parameters())


def test_a_group_counts_by_its_best_expert_or_by_its_best_two():
    # Group 0 holds the single best expert, group 1 the better pair.
    logits = torch.tensor([[3.0, -9.0, -9.0, 2.0, 1.5, -9.0]])
    chosen = {
        score: gate_of_logits(RouterConfig(score, num_groups=2, topk_groups=1), 6, 2)(logits).topk_idx[0, 0].item()
        for score in ("softmax", "sigmoid")
    }
    assert chosen == {"softmax": 0, "sigmoid": 3}


def test_dropped_groups_are_not_chosen_whatever_the_bias():
    router = gate_of_logits(RouterConfig("sigmoid", True, 2, 1), 4, 2)
    router.expert_bias -= 10.0  # all corrected scores are negative: zero would win over them
    assert router(torch.tensor([[1.0, 2.0, 0.0, 0.5]])).topk_idx.tolist() == [[1, 0]]


def test_loss_is_one_when_balanced_and_knows_sequences():
    # Sequence b sends all its tokens to expert b. Over the batch that is balanced, over each sequence it is not.
    x = torch.full((2, 4, 2), -30.0)
    x[0, :, 0] = x[1, :, 1] = 30.0
    batch = gate_of_logits(RouterConfig(batch_loss_weight=1.0), 2, 1)(x).aux_loss
    sequence = gate_of_logits(RouterConfig(sequence_loss_weight=1.0), 2, 1)(x).aux_loss
    torch.testing.assert_close(torch.stack([batch, sequence]), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("shape", [(0, H), (2, 0, H), (0, 4, H)])
def test_no_tokens(shape):
    router = router_of(CONFIGS["everything"])
    routing = router(torch.zeros(shape, dtype=torch.float64))
    assert routing.topk_idx.shape == routing.topk_weights.shape == (0, K)
    assert routing.aux_loss.item() == 0.0
    assert routing.num_tokens_per_expert.tolist() == [0] * E
    (routing.topk_weights.sum() + routing.aux_loss).backward()
    assert router.weight.grad.count_nonzero() == 0


def test_bias_update_by_hand():
    router = Router(H, 4, 2, RouterConfig(expert_bias=True))
    load = torch.tensor([6, 4, 3, 3])  # the mean is 4
    router.update_expert_bias(load, rate=0.25)
    assert router.expert_bias.tolist() == [-0.25, 0.0, 0.25, 0.25]
    router.update_expert_bias(load, rate=0.25)
    assert router.expert_bias.tolist() == [-0.5, 0.0, 0.5, 0.5]
    assert load.tolist() == [6, 4, 3, 3]
    with pytest.raises(EPArgumentError, match="expert_bias"):
        Router(H, 4, 2).update_expert_bias(load)


def test_the_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    router = gate_of_logits(RouterConfig("sigmoid", True), 8, 2)
    x = torch.randn(512, 8) + torch.linspace(-1, 1, 8)
    skewed = router(x).num_tokens_per_expert
    for _ in range(200):
        router.update_expert_bias(router(x).num_tokens_per_expert, rate=0.005)
    balanced = router(x).num_tokens_per_expert
    assert skewed.max() > 2 * skewed.float().mean()
    assert balanced.max() < 1.1 * balanced.float().mean()


def test_forward_changes_nothing_and_recomputation_counts_once():
    router = router_of(CONFIGS["everything"])
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    x = torch.randn(2, 6, H, dtype=torch.float64)
    results = []
    for run in (router, lambda x: checkpoint(router, x, use_reentrant=False)):
        router.zero_grad()
        routing = run(x)
        (routing.topk_weights.square().sum() + routing.aux_loss).backward()
        results.append((routing.num_tokens_per_expert, routing.aux_loss.detach(), router.weight.grad.clone()))
        assert routing.num_tokens_per_expert.sum() == 12 * K
        for name, tensor in router.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    torch.testing.assert_close(results[0], results[1])


def test_stays_in_float32_and_bias_is_in_checkpoints():
    torch.manual_seed(0)
    router = Router(H, E, K, RouterConfig("sigmoid", True))
    router.expert_bias.normal_()
    x = torch.randn(64, H).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = router(x.float())
    expected = router(x.float())
    torch.testing.assert_close(in_autocast, expected, rtol=0, atol=0)

    state = router.state_dict()
    router.to(torch.bfloat16)
    assert router.weight.dtype == router.expert_bias.dtype == torch.float32
    other = Router(H, E, K, RouterConfig("sigmoid", True))
    other.load_state_dict(state)
    for got in (router(x), other(x)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert router.double().expert_bias.dtype == torch.float64
    assert router.to("meta").weight.device.type == "meta"


def test_compiles_whole():
    router = router_of(CONFIGS["everything"])
    x = torch.randn(2, 6, H, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (router, torch.compile(router, fullgraph=True, backend="aot_eager")):
        routing = run(x)
        gradients = torch.autograd.grad(routing.topk_weights.square().sum() + routing.aux_loss, [x, router.weight])
        results.append((*routing, *gradients))
    torch.testing.assert_close(results[0], results[1])


def test_refusals():
    for arguments in ({"score_function": "relu"}, {"num_groups": 2, "topk_groups": 3}, {"topk_groups": 0}):
        with pytest.raises(EPArgumentError, match=next(reversed(arguments))):
            RouterConfig(**arguments)
    with pytest.raises(EPArgumentError, match="num_groups"):
        Router(H, 10, 2, RouterConfig(num_groups=3))
    with pytest.raises(EPArgumentError, match="num_topk"):
        Router(H, 12, 4, RouterConfig(num_groups=4, topk_groups=1))
