"""The networks behind the exchange. Shapes: N rows, H hidden, I width, E experts of all ranks, E_local of this rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..types import ExpertPlacement
from .grouped import grouped_mm


class GroupedExperts(nn.Module):
    """This rank's SwiGLU experts (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``, all of them in one call.

    Weights are drawn for every expert of every rank, and the own ones kept: with the same random state on all ranks, an
    expert starts with the same weights on any number of ranks.

    Args:
        hidden: H. width: I. num_experts: E, over all ranks.
        rank, num_ranks: experts lie in order over ranks; the first E mod R ranks own one more.
        device, dtype: of the parameters.

    Attributes:
        owned: the experts of this rank.
        gate_up: [E_local, 2 I, H], gate above up. down: [E_local, H, I].
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        num_experts: int,
        rank: int = 0,
        num_ranks: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_local = ExpertPlacement.shares(num_experts, num_ranks)
        first = sum(num_local[:rank])
        self.owned = range(first, first + num_local[rank])
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(len(self.owned), 2 * width, hidden, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(len(self.owned), hidden, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in (self.gate_up, self.down):
            drawn = weight.new_empty(weight.shape[1:])
            for expert in range(self.num_experts):
                nn.init.normal_(drawn, std=drawn.shape[1] ** -0.5)
                if expert in self.owned:
                    weight[expert - self.owned.start] = drawn

    def forward(self, x: torch.Tensor, offs: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
        """Each row through its expert, times its weight.

        Args:
            x: [N, H], sorted by local expert; parameters are cast to its dtype.
            offs: [E_local] int32, inclusive end row of each expert.
            row_weights: [N] float32. They multiply the inner activation, which gives the same sum as weighting the
                output, on narrower rows where I < H, and leaves the output as the last product wrote it.

        Returns:
            [N, H] of x's dtype.
        """
        gate, up = grouped_mm(x, self.gate_up.to(x.dtype).transpose(1, 2), offs).chunk(2, -1)
        inner = (F.silu(gate) * up * row_weights[:, None]).to(x.dtype)
        return grouped_mm(inner, self.down.to(x.dtype).transpose(1, 2), offs)


class SharedExpert(nn.Module):
    """The SwiGLU expert that every token passes (DeepSeekMoE, arXiv 2401.06066); parameters as in GroupedExperts.

    Args:
        hidden: H. width: I, of all shared experts together.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * width, hidden, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(hidden, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] of x's dtype for tokens x [T, H]."""
        gate, up = F.linear(x, self.gate_up.to(x.dtype)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down.to(x.dtype))
