"""Which experts a token goes to, and with which weights. Shapes: T tokens, H hidden, E experts, K slots, G groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..errors import EPArgumentError
from .sharded import draw_normal_


@dataclass(frozen=True)
class RouterConfig:
    """How a router scores, chooses and weighs. The default is a plain softmax top-k; :meth:`deepseek_v3` is another.

    Attributes:
        score_function: softmax over all experts, or a sigmoid for each.
        expert_bias: choose by score plus a bias for each expert, which is no parameter but moved by
            :meth:`Router.update_expert_bias`: balance without an auxiliary loss (arXiv 2408.15664, DeepSeek-V3 arXiv
            2412.19437). The bias takes part in the choice only, never in the weights.
        num_groups, topk_groups: experts are chosen from the best ``topk_groups`` of ``num_groups`` equal groups. A
            group is as good as its best expert (softmax; DeepSeek-V2, arXiv 2405.04434) or as the sum of its best two
            (sigmoid; DeepSeek-V3), biases included.
        normalize: divide a token's K weights by their sum.
        scaling_factor: then multiply them by this.
        batch_loss_weight: weight of the auxiliary loss over all tokens of the call (GShard arXiv 2006.16668, Switch
            Transformer arXiv 2101.03961).
        sequence_loss_weight: weight of the same loss over each sequence, averaged over sequences (DeepSeek-V3).
    """

    score_function: Literal["softmax", "sigmoid"] = "softmax"
    expert_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    normalize: bool = True
    scaling_factor: float = 1.0
    batch_loss_weight: float = 0.0
    sequence_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.score_function not in ("softmax", "sigmoid"):
            raise EPArgumentError.of("score_function", "'softmax' or 'sigmoid'", repr(self.score_function))
        if not 1 <= self.topk_groups <= self.num_groups:
            raise EPArgumentError.of("topk_groups", f"1 to num_groups ({self.num_groups})", self.topk_groups)

    @classmethod
    def deepseek_v3(cls, num_groups: int = 8, topk_groups: int = 4) -> RouterConfig:
        """As in DeepSeek-V3: sigmoid scores, a bias instead of a batch-wise loss, weights that sum to 2.5."""
        return cls("sigmoid", True, num_groups, topk_groups, scaling_factor=2.5, sequence_loss_weight=1e-4)


class Routing(NamedTuple):
    """What a router decides.

    Attributes:
        topk_idx: [T, K] int64, best first; no expert twice in a row.
        topk_weights: [T, K] float32 (float64 in a float64 router), differentiable.
        aux_loss: scalar of the weights' dtype, the weighted auxiliary losses; 0 without any.
        num_tokens_per_expert: [E] int64, how many slots of these T tokens chose each expert: the load.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    aux_loss: torch.Tensor
    num_tokens_per_expert: torch.Tensor


class Router(nn.Module):
    """Top-k router: one linear layer without bias, in float32 whatever the dtype of the rest.

    A forward pass changes nothing in the module: load and loss are returned, not accumulated. So recomputation under
    activation checkpointing counts nothing twice, and ``torch.compile`` sees a pure function.

    Args:
        hidden: H. num_experts: E. num_topk: K.
        config: how to score and choose; None is ``RouterConfig()``.
        device: of the parameters.

    Raises:
        EPArgumentError: K experts cannot be chosen from the groups, or groups do not divide E.
    """

    expert_bias: torch.Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        num_topk: int,
        config: RouterConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = config or RouterConfig()
        if num_experts % config.num_groups:
            raise EPArgumentError.of("num_groups", f"a divisor of num_experts ({num_experts})", config.num_groups)
        eligible = num_experts // config.num_groups * config.topk_groups
        if not 1 <= num_topk <= eligible:
            raise EPArgumentError.of("num_topk", f"1 to {eligible}, the experts of topk_groups groups", num_topk)
        self.num_experts, self.num_topk, self.config = num_experts, num_topk, config
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32, device=device))
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_normal_(self.weight, self.weight.shape[1] ** -0.5)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # In bf16 the bias would stop moving (0.5 + 0.001 = 0.5) and near scores would tie: `.to(bf16)` stops here.
        def wide(t: torch.Tensor) -> torch.Tensor:
            moved = fn(t)
            return moved if moved.dtype.itemsize >= t.dtype.itemsize else t.to(moved.device)

        return super()._apply(wide, recurse)

    def forward(self, x: torch.Tensor) -> Routing:
        """Route tokens.

        Args:
            x: [*, S, H], any float dtype. S is the length of a sequence, where a loss is taken over sequences.

        Returns:
            The routing of the T = * × S tokens, in order.
        """
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)
        scores = logits.softmax(-1) if config.score_function == "softmax" else logits.sigmoid()
        topk_idx = self._choose(scores.detach().reshape(-1, self.num_experts))
        topk_weights = scores.reshape(-1, self.num_experts).gather(1, topk_idx)
        if config.normalize:
            # A sum of sigmoids may underflow to zero; softmax's largest K cannot.
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + torch.finfo(topk_weights.dtype).tiny)
        topk_weights = topk_weights * config.scaling_factor
        load = count_choices(topk_idx[None], self.num_experts)[0]
        return Routing(topk_idx, topk_weights, self._aux_loss(scores), load)

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[T, K] the experts chosen for scores [T, E]."""
        config = self.config
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if config.num_groups > 1:
            groups = scores.unflatten(1, (config.num_groups, -1))
            best = 1 if config.score_function == "softmax" else min(2, groups.shape[-1])
            group_scores = groups.topk(best, -1).values.sum(-1)
            kept = group_scores.topk(config.topk_groups, -1).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
            scores = groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)
        return scores.topk(self.num_topk, -1).indices

    def _aux_loss(self, scores: torch.Tensor) -> torch.Tensor:
        config = self.config
        loss = scores.new_zeros(())
        if config.batch_loss_weight:
            batch = scores.reshape(1, -1, self.num_experts)
            loss = loss + config.batch_loss_weight * load_balancing_loss(batch, self.num_topk)
        if config.sequence_loss_weight:
            sequences = scores.flatten(0, -3) if scores.dim() >= 3 else scores.reshape(1, -1, self.num_experts)
            loss = loss + config.sequence_loss_weight * load_balancing_loss(sequences, self.num_topk)
        return loss

    @torch.no_grad()
    def update_expert_bias(
        self, num_tokens_per_expert: torch.Tensor, rate: float = 1e-3, group: dist.ProcessGroup | None = None
    ) -> None:
        """Move the bias of overloaded experts down and of underloaded ones up by ``rate`` (arXiv 2408.15664).

        To be called after the optimizer's step, on all ranks that share the router; only the load may differ.

        Args:
            num_tokens_per_expert: [E] load of this rank since the last update: what forward returned, summed over
                micro-batches.
            rate: the size of a step; 0.001 in DeepSeek-V3.
            group: ranks whose loads are summed (those that route different tokens with the same router); None: no sum.

        Raises:
            EPArgumentError: the router has no bias.
        """
        if self.expert_bias is None:
            raise EPArgumentError.of("config.expert_bias", "True, to update the bias", False)
        load = num_tokens_per_expert.to(self.expert_bias.device, torch.int64, copy=True)
        if group is not None:
            dist.all_reduce(load, group=group)
        # Integers: the sign is exact, and so the same on every rank.
        self.expert_bias += rate * torch.sign(load.sum() - self.num_experts * load)


def count_choices(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[B, E] int64: how often each expert stands in each of B tables topk_idx [B, S, K]."""
    choices = topk_idx.flatten(1)
    return choices.new_zeros(choices.shape[0], num_experts).scatter_add_(1, choices, torch.ones_like(choices))


def load_balancing_loss(scores: torch.Tensor, num_topk: int) -> torch.Tensor:
    """``sum over e of f_e P_e``, averaged over sequences: 1 where all experts are alike, more where load gathers.

    ``f_e = E / (K S)`` × the tokens that have e among the top-k of their scores (as they are: without bias and groups),
    ``P_e`` the mean over tokens of the score's share. GShard (arXiv 2006.16668) and Switch (arXiv 2101.03961) take it
    over a batch, DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20) over a sequence. Differentiable through P.

    Args:
        scores: [B, S, E] positive, of B sequences; the loss of nothing is 0.
        num_topk: K.
    """
    num_sequences, num_tokens, num_experts = scores.shape
    chosen = count_choices(scores.detach().topk(num_topk, -1).indices, num_experts)
    f = chosen.to(scores.dtype) * (num_experts / (num_topk * max(num_tokens, 1)))
    p = (scores / scores.sum(-1, keepdim=True)).sum(1) / max(num_tokens, 1)
    return (f * p).sum() / max(num_sequences, 1)
