"""The networks behind the exchange. Shapes: N rows, H hidden, I width, R ranks, E experts, E_local of this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..types import ExpertPlacement
from .grouped import grouped_mm
from .sharded import draw_normal_, local, position, sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class GroupedExperts(nn.Module):
    """This rank's SwiGLU experts (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``, all of them in one call.

    With a mesh of several ranks, parameters are DTensors of all experts, split over its ranks by ``Shard(0)``; so state
    dicts, checkpoints and optimizers of torch know what each rank holds. Else they are plain tensors of this rank's
    experts.

    Weights are drawn for every expert of every rank, and the own ones kept: with the same random state on all ranks, an
    expert starts with the same weights on any number of ranks.

    Args:
        hidden: H. width: I. num_experts: E, over all ranks.
        rank, num_ranks: which experts to hold where there is no mesh. Experts lie in order over ranks, ceil(E / R) on
            each as long as there are any ("chunked", see :class:`.ExpertPlacement`).
        mesh: of one dimension, over whose ranks the experts are split.
        device, dtype: of the parameters.

    Attributes:
        owned: the experts of this rank. num_ranks: R.
        gradient_divisor: gradients of the parameters are divided by it; 1. They are sums over the tokens of all R
            ranks. Where a wrapper takes means over ranks of all gradients, R makes those of the experts means as well.
        gate_up: [E, 2 I, H], gate above up. down: [E, H, I]. Without a mesh [E_local, ...].
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        num_experts: int,
        rank: int = 0,
        num_ranks: int = 1,
        *,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mesh is not None:
            rank, num_ranks = mesh.get_local_rank(), mesh.size()
        num_local = ExpertPlacement.shares(num_experts, num_ranks, "chunked")
        first = sum(num_local[:rank])
        self.owned = range(first, first + num_local[rank])
        self.num_experts, self.num_ranks = num_experts, num_ranks
        self.gradient_divisor = 1
        self._sizes = f"hidden={hidden}, width={width}, num_experts={num_experts}, num_ranks={num_ranks}"

        def parameter(rows: int, columns: int) -> nn.Parameter:
            part = torch.empty(len(self.owned), rows, columns, device=device, dtype=dtype)
            return nn.Parameter(part if mesh is None or num_ranks == 1 else sharded(part, num_experts, mesh))

        self.gate_up, self.down = parameter(2 * width, hidden), parameter(hidden, width)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return self._sizes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.gate_up.is_meta:
            return
        for weight in (self.gate_up, self.down):
            part, (held, *inside) = local(weight), position(weight)
            mine = self.owned if part is weight else range(held.start, held.stop)
            drawn = torch.empty(weight.shape[1:], dtype=part.dtype, device=part.device)
            for expert in range(self.num_experts):
                nn.init.normal_(drawn, std=drawn.shape[1] ** -0.5)
                if expert in mine:
                    part[expert - mine.start] = drawn[tuple(inside)]

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
        # A compiler guards on a string that is read. Otherwise torch 2.13 runs one program for layers with different
        # numbers of experts, and that program has the number of one of them in its gradients.
        assert self._sizes
        gate_up, down = local(self.gate_up), local(self.down)
        if self.gradient_divisor != 1:
            gate_up, down = (_DivideGradient.apply(w, self.gradient_divisor) for w in (gate_up, down))
        gate, up = grouped_mm(x, gate_up.to(x.dtype).transpose(1, 2), offs).chunk(2, -1)
        inner = (F.silu(gate) * up * row_weights[:, None]).to(x.dtype)
        return grouped_mm(inner, down.to(x.dtype).transpose(1, 2), offs)


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient / ctx.divisor, None


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
            draw_normal_(weight, weight.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] of x's dtype for tokens x [T, H]."""
        gate, up = F.linear(x, self.gate_up.to(x.dtype)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down.to(x.dtype))
