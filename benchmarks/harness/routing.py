"""Inputs and routing of one shape, from a seed: every rank knows everyone's, so checks need no communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SHEET_ROWS = 61  # a prime: rows of equal content are never neighbours


@dataclass(frozen=True)
class Shape:
    """T tokens a rank, hidden size, E experts (contiguous, a multiple of the ranks), K slots."""

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int

    @property
    def bf16_row_bytes(self) -> int:
        return 2 * self.hidden

    @property
    def num_scales(self) -> int:
        return -(-self.hidden // 128)

    @property
    def fp8_row_bytes(self) -> int:
        return self.hidden + 4 * self.num_scales

    def dispatch_row_bytes(self, fp8: bool) -> int:
        """b of a dispatch: x, scale factors, topk_idx (int64), topk_weights (float32)."""
        return (self.fp8_row_bytes if fp8 else self.bf16_row_bytes) + 12 * self.num_topk

    def combine_row_bytes(self) -> int:
        """b of a combine: the bf16 row and its K float32 weights."""
        return self.bf16_row_bytes + 4 * self.num_topk


class Problem:
    """One shape on ``size`` ranks, as ``rank`` sees it.

    Routing is DeepEP's own test: |normal| + 1 scores per token and expert, the K largest win. Rows are slices of one
    random sheet with (source rank, source token) written into their first three elements, so that any received row can
    be predicted, and a row at a wrong place shows.
    """

    def __init__(self, shape: Shape, rank: int, size: int, seed: int = 0) -> None:
        if shape.num_experts % size:
            raise SystemExit(f"--experts: a multiple of the {size} ranks, not {shape.num_experts}")
        self.shape, self.rank, self.size, self.seed = shape, rank, size, seed
        self.topk_idx_of = [self._route(r) for r in range(size)]
        self.topk_idx = self.topk_idx_of[rank]
        self.topk_weights = self.weights_of(rank)
        generator = torch.Generator().manual_seed(seed + 7)
        self._sheet = torch.randn((_SHEET_ROWS, shape.hidden), generator=generator).to(torch.bfloat16)
        self.x = self.rows(torch.full((shape.num_tokens,), rank), torch.arange(shape.num_tokens))

    def _route(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank)
        scores = torch.randn((self.shape.num_tokens, self.shape.num_experts), generator=generator).abs_() + 1
        return torch.topk(scores, self.shape.num_topk, dim=1, sorted=True).indices.contiguous()

    def weights_of(self, rank: int) -> Tensor:
        """[T, K] float32: token and slot of each weight can be read off it."""
        count = self.shape.num_tokens * self.shape.num_topk
        return (torch.arange(count, dtype=torch.float32) + 0.25 + rank).view(-1, self.shape.num_topk)

    def rows(self, source: Tensor, token: Tensor) -> Tensor:
        """[n, H] bfloat16: x of those source ranks and tokens."""
        out = self._sheet[(token * self.size + source) % _SHEET_ROWS]
        for column, value in enumerate((source, token // 128, token % 128)[: self.shape.hidden]):
            out[:, column] = value.to(torch.bfloat16)
        return out

    def fp8_rows(self, source: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """[n, H] float8_e4m3fn and [n, S] float32 of those source ranks and tokens; opaque bytes."""
        hidden = self.shape.hidden
        sheet = self._sheet.view(torch.uint8)[:, :hidden] & 0x7E  # never a NaN
        out = sheet[(token * self.size + source) % _SHEET_ROWS]
        for column, value in enumerate((source, token // 128, token % 128)[:hidden]):
            out[:, column] = value.to(torch.uint8)
        sf = (token * self.size + source).to(torch.float32)[:, None] + torch.arange(self.shape.num_scales)
        return out.view(torch.float8_e4m3fn), sf.contiguous()

    @cached_property
    def fp8_x(self) -> tuple[Tensor, Tensor]:
        return self.fp8_rows(torch.full((self.shape.num_tokens,), self.rank), torch.arange(self.shape.num_tokens))

    @cached_property
    def slots_to(self) -> Tensor:
        """[R, T, R] int64: how many slots of each source's token go to each rank."""
        share = self.shape.num_experts // self.size
        one_hot = [torch.nn.functional.one_hot(idx // share, self.size).sum(1) for idx in self.topk_idx_of]
        return torch.stack(one_hot)

    @cached_property
    def counts(self) -> list[list[int]]:
        """[source][destination]: unique tokens sent."""
        found: list[list[int]] = (self.slots_to > 0).sum(1).tolist()
        return found

    @cached_property
    def slot_counts(self) -> list[list[int]]:
        """[source][destination]: expanded rows sent."""
        found: list[list[int]] = self.slots_to.sum(1).tolist()
        return found

    def total_rows(self, expand: bool) -> int:
        """Received rows, summed over ranks."""
        return sum(map(sum, self.slot_counts if expand else self.counts))

    @property
    def num_recv(self) -> int:
        """N of this rank."""
        return sum(row[self.rank] for row in self.counts)

    def received(self) -> tuple[Tensor, Tensor]:
        """(source rank, source token) of every compact row this rank receives, in the library's order."""
        pairs = (self.slots_to[:, :, self.rank] > 0).nonzero()
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()

    def received_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """(source rank, source token, slot) of every expanded row: by local expert, source rank, token, slot."""
        share = self.shape.num_experts // self.size
        every = torch.stack(self.topk_idx_of)
        source, token, slot = ((every // share) == self.rank).nonzero(as_tuple=True)
        order = torch.sort(every[source, token, slot], stable=True).indices
        return source[order], token[order], slot[order]

    def local_topk(self, source: Tensor, token: Tensor) -> Tensor:
        """[n, K] int64: local expert ids here, -1 elsewhere."""
        share = self.shape.num_experts // self.size
        ids = torch.stack(self.topk_idx_of)[source, token]
        return torch.where(ids // share == self.rank, ids - self.rank * share, -1)

    @staticmethod
    def scale(rank: int) -> float:
        """What an expert rank multiplies its rows with in the checks: sums of such rows are exact in float32."""
        return float(2 ** (rank % 8))

    def combined(self, expand: bool, tokens: slice) -> Tensor:
        """[n, H] bfloat16: what combine returns for these tokens if rank r multiplied its rows by scale(r)."""
        slots = self.slots_to[self.rank, tokens]
        x = self.x[tokens].float()
        if not expand:
            factor = sum((slots[:, r] > 0) * self.scale(r) for r in range(self.size))
            return (x * factor[:, None]).to(torch.bfloat16)  # type: ignore[index]
        # A rank's slots are summed and rounded to bfloat16 first.
        parts = [(x * slots[:, r, None]).to(torch.bfloat16).float() * self.scale(r) for r in range(self.size)]
        return torch.stack(parts).sum(0).to(torch.bfloat16)


def all_rows(count: int, holds: Callable[[slice], bool]) -> bool:
    """Whether a check holds for every piece of ``count`` rows. In pieces, because fresh memory is slow."""
    return all(holds(slice(begin, min(begin + 256, count))) for begin in range(0, count, 256))
