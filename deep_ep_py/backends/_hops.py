"""From a routing to its two hops: what crosses to which domain, and where a relay places it. Pure functions but for the
one exchange that carries tokens' top-k ids, weights and indices ahead of their rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import _C
from .._pairs import PairChannel
from ..errors import EPArgumentError
from ..plans import LAYOUTS, Plan, PlanLayout
from ..types import DispatchSpec
from ._domains import Domains
from ._pipeline import Pace
from ._record import Record
from .base import Domain

_MOST_TOLD_DOMAINS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """Where rows can go from a rank: along its ``rail`` (by domain), and inside its ``domain`` (by index)."""

    domains: Domains
    rail: PairChannel
    domain: Domain
    pace: Pace


@dataclass(slots=True, eq=False)
class Homeward:
    """What returns from each domain for this rank's tokens: csrc/protocol/plan.hpp, ``homeward``.

    Attributes:
        home: [T, W] int64, domain << 32 | place in what it returns.
        tokens: by domain, [n] int64 ascending: the token of each row that it returns.
    """

    home: torch.Tensor
    tokens: list[torch.Tensor]

    @classmethod
    def of(cls, plan: Plan, domains: Domains, *, per_row: bool = False) -> Homeward:
        """Raises EPArgumentError: the plan is damaged."""
        return cls.of_targets(plan.layout, plan.targets, domains, per_row=per_row)

    @classmethod
    def of_targets(
        cls, layout: PlanLayout, targets: torch.Tensor, domains: Domains, *, per_row: bool = False
    ) -> Homeward:
        num_tokens, num_slots = targets.shape
        num_domains = len(domains.members)
        home = _int64(num_tokens, num_domains if layout == "rank" else num_slots)
        capacity = num_tokens * num_slots if per_row else num_tokens
        tokens, counts = _int64(num_domains, capacity), _int64(num_domains)
        sound = _C.homeward(
            layout=LAYOUTS.index(layout),
            targets=targets.data_ptr(),
            num_tokens=num_tokens,
            num_slots=num_slots,
            domain_of=domains.of.data_ptr(),
            num_ranks=domains.num_ranks,
            num_domains=num_domains,
            per_row=per_row,
            home=home.data_ptr(),
            tokens=tokens.data_ptr(),
            capacity=capacity,
            counts=counts.data_ptr(),
        )
        if not sound:
            raise EPArgumentError.of("handle", f"targets on ranks below {domains.num_ranks}", "a rank beyond them")
        return cls(home, [row[:n] for row, n in zip(tokens, counts.tolist(), strict=True)])


def crossings(home: Homeward, plan: Plan) -> dict[str, list[int]]:
    """What a rank tells of a plan: tokens that it sends to each domain, and that it relays from there. Nothing where
    there are more domains than a record has room for: then a damaged plan is found by the transport, which is fatal.

    Raises EPArgumentError: the plan is damaged."""
    relayed = plan.relay_counts.tolist()
    if min(relayed) < 0 or sum(relayed) != plan.num_relayed:
        raise EPArgumentError.of("handle", f"counts of the {plan.num_relayed} tokens that are relayed", relayed)
    if len(relayed) > _MOST_TOLD_DOMAINS:
        return {"sent": [], "relayed": []}
    return {"sent": [t.numel() for t in home.tokens], "relayed": relayed}


def check_crossings(records: list[Record], domains: Domains, seq: int) -> None:
    """Both ends of every way across count alike: sizes are not told on the wire. On every rank alike.

    Raises EPArgumentError: a plan is damaged."""
    if len(domains.members) > _MOST_TOLD_DOMAINS:
        return
    members = torch.tensor(domains.members, dtype=torch.int64, device="cpu")
    sent, relayed = (
        torch.tensor([r.tell[name] for r in records], dtype=torch.int64, device="cpu")[members]
        for name in ("sent", "relayed")
    )
    differs = sent != relayed.permute(2, 1, 0)  # [from domain, index, to domain]
    differs.diagonal(dim1=0, dim2=2).fill_(False)
    if not differs.any():
        return
    d, index, e = differs.nonzero()[0].tolist()
    pair = (domains.members[d][index], domains.members[e][index])
    n, m = int(sent[d, index, e]), int(relayed[e, index, d])
    message = f"handle: rank {pair[0]} sends {n} tokens, of which rank {pair[1]} relays {m}"
    raise EPArgumentError(message, argument="handle", phase="notify", seq=seq, ranks=pair)


@dataclass(slots=True, eq=False)
class Headers:
    """What a relay learns of one origin's tokens before their rows: ``types.DispatchSpec``, for those tokens."""

    tokens: torch.Tensor
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    is_token_in_rank: torch.Tensor | None = None


def header_bytes(spec: DispatchSpec, num_here: int) -> int:
    """Bytes that travel for one token ahead of its row; ``num_here``: ranks of a domain."""
    num_topk, weights = 0, 0
    if spec.topk_idx is not None:
        num_topk = spec.topk_idx.shape[1]
    if spec.topk_weights is not None:
        weights = spec.topk_weights.shape[1] * spec.topk_weights.element_size()
    if spec.plan is not None:
        return weights
    return 4 + 4 * num_topk + weights + (num_here if spec.layout == "rank" else 0)


def exchange_headers(
    spec: DispatchSpec, domains: Domains, rail: PairChannel, sent: list[torch.Tensor], received: list[int]
) -> list[Headers]:
    """By origin domain, the headers of the tokens that this rank relays. ``sent``: by domain, this rank's tokens."""
    outputs, inputs = [], []
    for d, members in enumerate(domains.members):
        width = header_bytes(spec, len(members))
        mine = d == domains.domain
        inputs.append(_bytes(0, width) if mine else _pack(spec, domains, d, sent[d], members))
        outputs.append(_bytes(0 if mine else received[d], width))
    if outputs[0].shape[1]:
        rail.start(outputs, inputs).wait()
    return [_unpack(spec, len(domains.here), rows) for rows in outputs]


def _pack(
    spec: DispatchSpec, domains: Domains, domain: int, tokens: torch.Tensor, members: tuple[int, ...]
) -> torch.Tensor:
    parts = []
    if spec.plan is None:
        parts.append(tokens.to(torch.int32)[:, None])
        if spec.topk_idx is not None:
            assert spec.placement is not None
            ids = spec.topk_idx[tokens]
            there = (domains.of[spec.placement.rank.long()] == domain)[ids.clamp(min=0)] & (ids >= 0)
            parts.append(torch.where(there, ids, -1).to(torch.int32))
    if spec.topk_weights is not None:
        parts.append(spec.topk_weights[tokens])
    if spec.plan is None and spec.layout == "rank":
        assert spec.is_token_in_rank is not None
        parts.append(spec.is_token_in_rank[tokens][:, list(members)])
    return (
        torch.cat([p.clone(memory_format=torch.contiguous_format).view(torch.uint8) for p in parts], 1)
        if parts
        else _bytes(tokens.numel(), 0)
    )


def _unpack(spec: DispatchSpec, num_here: int, rows: torch.Tensor) -> Headers:
    at = 0

    def take(columns: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal at
        # Not .contiguous(): a lone row counts as contiguous whatever its stride is.
        part = rows[:, at : at + columns * dtype.itemsize].clone(memory_format=torch.contiguous_format)
        at += columns * dtype.itemsize
        return part.view(dtype) if part.numel() else torch.empty((0, columns), dtype=dtype, device="cpu")

    new = spec.plan is None
    headers = Headers(take(1, torch.int32).view(-1) if new else torch.empty(0, dtype=torch.int32, device="cpu"))
    if new and spec.topk_idx is not None:
        headers.topk_idx = take(spec.topk_idx.shape[1], torch.int32).long()
    if spec.topk_weights is not None:
        headers.topk_weights = take(spec.topk_weights.shape[1], spec.topk_weights.dtype)
    if new and spec.layout == "rank":
        headers.is_token_in_rank = take(num_here, torch.bool)
    return headers


def _int64(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cpu")


def _bytes(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


@dataclass(slots=True, eq=False)
class Chunks:
    """How rows cross: ``rows`` at a time to and from each peer. Sizes are both sides' knowledge, so both count alike.

    Attributes:
        sent, received: rows by domain; nothing to and from the own one.
    """

    rows: int
    sent: list[int]
    received: list[int]
    rounds: int = field(init=False)

    @classmethod
    def across(cls, ways: Ways, row_bytes: int, sent: list[int], received: list[int]) -> Chunks:
        me = ways.domains.domain
        others = [[0 if d == me else n for d, n in enumerate(counts)] for counts in (sent, received)]
        # A round goes to and comes from every other domain: together they are one chunk of the link.
        num_others = max(len(ways.domains.members) - 1, 1)
        return cls(ways.pace.chunk_rows(row_bytes * num_others), *others)

    @property
    def most(self) -> int:
        """Rows in the busier direction."""
        return max(sum(self.sent), sum(self.received))

    def __post_init__(self) -> None:
        self.rounds = -(-max([*self.sent, *self.received, 0]) // self.rows)

    def sent_in(self, i: int, domain: int) -> tuple[int, int]:
        return self._part(i, self.sent[domain])

    def received_in(self, i: int, domain: int) -> tuple[int, int]:
        return self._part(i, self.received[domain])

    def _part(self, i: int, n: int) -> tuple[int, int]:
        return min(i * self.rows, n), min((i + 1) * self.rows, n)
