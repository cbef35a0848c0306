"""A small language model over bytes whose feed-forward networks are Mixtures of Experts, and the batches it reads.

Shapes: B sequences of this rank, S bytes of each, H hidden, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from deep_ep_py import ElasticBuffer
from deep_ep_py.nn import MoELayer, RouterConfig, SharedExpert


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model: S, H, blocks (the first is dense), heads, E, K, inner width of an expert."""

    context: int
    hidden: int
    layers: int
    heads: int
    experts: int
    topk: int
    width: int


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a feed-forward network: dense without a buffer, else a Mixture of Experts over its ranks."""

    def __init__(self, config: ModelConfig, buffer: ElasticBuffer | None, separate_plan: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden), nn.RMSNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads)
        self.feed_forward: nn.Module
        if buffer is None:  # as wide as what a token meets in the other blocks
            self.feed_forward = SharedExpert(config.hidden, (config.topk + 1) * config.width)
        else:
            self.feed_forward = MoELayer(
                config.hidden,
                config.width,
                config.experts,
                config.topk,
                buffer,
                router=RouterConfig("sigmoid", expert_bias=True, sequence_loss_weight=1e-4),
                shared_width=config.width,
                separate_plan=separate_plan,
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[B, S, H]; auxiliary loss and load [E] of a Mixture of Experts."""
        x = x + self.attention(self.norm1(x))
        found = self.feed_forward(self.norm2(x))
        if isinstance(self.feed_forward, MoELayer):
            return x + found.output, found.aux_loss, found.num_tokens_per_expert
        return x + found, None, None


class ByteLM(nn.Module):
    """The model of this rank: its share of the experts, all of the rest.

    Args:
        recompute: keep only the blocks' inputs and the plans of dispatch for the backward pass: the rest is computed
            anew, and rows are exchanged anew, but no counts.
    """

    def __init__(self, config: ModelConfig, buffer: ElasticBuffer, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(256, config.hidden)
        self.position = nn.Embedding(config.context, config.hidden)
        self.blocks = nn.ModuleList(Block(config, buffer if i else None, recompute) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, 256, bias=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.3)

    def moe_layers(self) -> list[MoELayer]:
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoELayer)]

    def forward(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of the predictions' cross entropies, the auxiliary loss (a mean over sequences), and load [L, E], for
        sequences [B, S + 1]. B = 0 is fine: the experts here still serve the other ranks."""
        x = self.embed(sequences[:, :-1]) + self.position.weight
        aux_loss, load = x.new_zeros(()), []
        saved = partial(create_selective_checkpoint_contexts, [torch.ops.deep_ep_py.plan.default])
        for block in self.blocks:
            found = checkpoint(block, x, use_reentrant=False, context_fn=saved) if self.recompute else block(x)
            x = found[0]
            if found[1] is not None:
                aux_loss = aux_loss + found[1]
                load.append(found[2])
        logits = self.head(self.norm(x)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction="sum")
        return loss, aux_loss, torch.stack(load)


def share(count: int, rank: int, num_ranks: int) -> slice:
    """A rank's part of ``count`` things in order; parts differ by one at most."""
    return slice(count * rank // num_ranks, count * (rank + 1) // num_ranks)


def global_batch(text: bytes, seed: int, step: int, num_sequences: int, length: int) -> torch.Tensor:
    """[num_sequences, length] bytes as int64: all that a step reads, whatever the number of ranks and wherever a run
    began: it follows from the seed and the step alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(len(text) - length + 1, (num_sequences,), generator=generator).tolist()
    return torch.tensor([list(text[start : start + length]) for start in starts], dtype=torch.int64)
