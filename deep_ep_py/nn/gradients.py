"""What torch does with all gradients of a model at once, for plain tensors beside DTensors of several meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from .sharded import local, parameters_by_mesh, sharded_as


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for any mixture of plain tensors and DTensors.

    Collective over the meshes of the DTensors, of which every element counts once, wherever it lies. Gradients that are
    plain tensors count as they are: they must be the same on all ranks, or ranks clip differently.

    Args:
        parameters: with gradients; those without one are left out.
        max_norm: gradients are multiplied by ``min(1, max_norm / (total norm + 1e-6))``.
        norm_type: p of the norm; may be ``inf``.
        error_if_nonfinite: raise RuntimeError where the total norm is infinite or no number.
        foreach: as in torch.

    Returns:
        The total norm: a plain scalar, the same on all ranks.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    groups = parameters_by_mesh(p for p in given if p.grad is not None)
    norms = [
        torch.nn.utils.get_total_norm([_grad(p, norm_type) for p in g], norm_type, foreach=foreach) for g in groups
    ]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.nn.utils.get_total_norm(whole, norm_type, error_if_nonfinite, foreach)
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total, foreach)
    return total


def _grad(parameter: torch.Tensor, norm_type: float) -> torch.Tensor:
    """Ranks that hold no element give a zero where torch has no norm of nothing, which is where it is the maximum."""
    gradient = parameter.grad
    assert gradient is not None
    part = local(gradient)
    if part.numel() or float(norm_type) != math.inf:
        return gradient
    return sharded_as(part.new_zeros((1,) * part.dim()), gradient)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for any mixture of plain tensors and DTensors, which torch's own refuses.

    Collective over the meshes of the DTensors. All ranks skip a step together if those gradients that are plain tensors
    are the same on all ranks.
    """

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        # As torch's ShardedGradScaler, which overrides it too; it reads nothing of the optimizer but its parameters.
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found: dict[torch.device, torch.Tensor] = {}
        for group in parameters_by_mesh(parameters):
            part: Any = SimpleNamespace(param_groups=[{"params": group}])
            for device, inf in super()._unscale_grads_(part, inv_scale, found_inf.clone(), allow_fp16).items():
                found[device] = torch.maximum(found[device], inf) if device in found else inf
        return found
