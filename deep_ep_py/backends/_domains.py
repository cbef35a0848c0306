"""Who shares a domain with whom, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Domains:
    """The ranks of a buffer by scale-up domain, as one of them sees them. Domains are of one size.

    Attributes:
        members: [D][U] ranks of each domain, ascending; domains in the order of their lowest ranks.
        rank: this rank; domain, index: where it stands in ``members``.
        of: [R] int32, each rank's domain.
        order: [R] int64, where each rank stands when everything is sorted by (index in its domain, domain).
    """

    members: tuple[tuple[int, ...], ...]
    rank: int
    domain: int
    index: int
    of: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of_members(cls, members: Sequence[Sequence[int]], rank: int) -> Domains:
        num_domains, num_ranks = len(members), sum(map(len, members))
        of, order = [0] * num_ranks, [0] * num_ranks
        for d, ranks in enumerate(members):
            for i, r in enumerate(ranks):
                of[r], order[r] = d, i * num_domains + d
        domain = of[rank]
        return cls(
            members=tuple(tuple(ranks) for ranks in members),
            rank=rank,
            domain=domain,
            index=list(members[domain]).index(rank),
            of=torch.tensor(of, dtype=torch.int32, device="cpu"),
            order=torch.tensor(order, dtype=torch.int64, device="cpu"),
        )

    @property
    def num_ranks(self) -> int:
        return self.of.numel()

    @property
    def rail(self) -> tuple[int, ...]:
        """[D] ranks with this rank's index, by domain."""
        return tuple(ranks[self.index] for ranks in self.members)

    @property
    def here(self) -> tuple[int, ...]:
        """[U] ranks of this rank's domain."""
        return self.members[self.domain]


def group_by_domain(words: Sequence[object]) -> list[list[int]]:
    """Ranks with the same word, domains in the order of their lowest ranks."""
    found: dict[object, list[int]] = {}
    for rank, word in enumerate(words):
        found.setdefault(word, []).append(rank)
    return list(found.values())
