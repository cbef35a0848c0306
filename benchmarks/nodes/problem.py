"""Inputs whose sums are exact whatever their order, two routings, and what these must put on the wire."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import comb

import torch
from harness.routing import Problem, Shape
from torch import Tensor

from deep_ep_py.nn import Router, RouterConfig

ROUTINGS = ("even", "groups")
NUM_GROUPS, TOPK_GROUPS = 8, 4  # DeepSeek-V3's
_DIGITS = {"source": 4, "token": 8}  # of base 4: 256 ranks, 65536 tokens
_ROUTER_HIDDEN = 64  # of the router that draws the second routing; enough for scores to be independent
_SAMPLED_ROUTERS = 16


class NodesProblem(Problem):
    """A :class:`Problem` on ``num_domains`` domains of equal size.

    Rows are whole numbers from 0 to 3 that spell (source rank, source token), and an expert rank multiplies by 1 to 4:
    sums stay below 256, the last whole number that bfloat16 has, so domains may add in any order and round as they go.

    Args:
        routing: ``even``: K different experts, all alike. ``groups``: chosen from the best 4 of 8 groups of experts, by
            the router of DeepSeek-V3 with random weights.
    """

    def __init__(self, shape: Shape, rank: int, size: int, num_domains: int, routing: str, seed: int = 0) -> None:
        self.num_domains, self.routing = num_domains, routing
        super().__init__(shape, rank, size, seed)

    def _route(self, rank: int) -> Tensor:
        if self.routing == "even":
            return super()._route(rank)
        return _group_limited(self.shape, self.seed, self.seed * 1_000_003 + rank)

    def rows(self, source: Tensor, token: Tensor) -> Tensor:
        out = torch.empty((len(token), self.shape.hidden), dtype=torch.bfloat16)
        digits = torch.stack(
            [
                (n >> 2 * i) & 3
                for n, count in zip((source, token), _DIGITS.values(), strict=True)
                for i in range(count)
            ],
            1,
        ).to(torch.bfloat16)
        for first in range(0, self.shape.hidden, digits.shape[1]):
            part = out[:, first : first + digits.shape[1]]
            part.copy_(digits[:, : part.shape[1]])
        return out

    @staticmethod
    def scale(rank: int) -> float:
        return float(1 + rank % 4)

    @cached_property
    def domains_of_tokens(self) -> Tensor:
        """[R, T, D] bool: the domains that a source's token goes to, its own included."""
        in_rank = self.slots_to > 0
        return in_rank.view(*in_rank.shape[:2], self.num_domains, -1).any(3)

    @property
    def num_sent_per_rank(self) -> float:
        """Unique (token, domain) of a rank, the mean: what DeepEP's scale-out column counts."""
        return int(self.domains_of_tokens.sum()) / self.size

    def wire_rows(self, contender: str) -> list[list[int]]:
        """[D][D]: rows that cross from domain to domain. Two hops: one a domain; else one a rank."""
        size = self.size // self.num_domains
        by_source = self.domains_of_tokens if contender == "hierarchical" else self.slots_to > 0
        rows = by_source.sum(1).view(self.num_domains, size, self.num_domains, -1).sum((1, 3))
        rows.fill_diagonal_(0)
        found: list[list[int]] = rows.tolist()
        return found

    def expected_crossings(self) -> float:
        """Other domains a token goes to, on average, if all experts are alike.

        ``even``: in closed form. ``groups``: the mean over other routers of random weights. What a group is kept for,
        the sum of its best two, makes it likelier to be used than a draw from the kept groups would be.
        """
        experts, topk, domains = self.shape.num_experts, self.shape.num_topk, self.num_domains
        if self.routing == "even":
            return (domains - 1) * (1 - comb(experts - experts // domains, topk) / comb(experts, topk))
        many = replace(self.shape, num_tokens=1024)
        chosen = torch.cat([_group_limited(many, seed, seed) for seed in range(1000, 1000 + _SAMPLED_ROUTERS)])
        visited = torch.nn.functional.one_hot(chosen // (experts // domains), domains).amax(1).sum(1)
        return float(visited.double().mean()) * (domains - 1) / domains  # the own domain is one as any


def _group_limited(shape: Shape, router_seed: int, token_seed: int) -> Tensor:
    """[T, K] the choice of a DeepSeek-V3 router of random weights for random tokens."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(router_seed)
        config = RouterConfig.deepseek_v3(NUM_GROUPS, TOPK_GROUPS)
        router = Router(_ROUTER_HIDDEN, shape.num_experts, shape.num_topk, config)
        torch.manual_seed(token_seed)
        return router(torch.randn(shape.num_tokens, _ROUTER_HIDDEN)).topk_idx.contiguous()
