"""Experts inside torch's DistributedDataParallel, which takes every parameter to be the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import EPError
from .experts import GroupedExperts
from .sharded import local

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_CHECKED = "_deep_ep_py_experts_checked"  # on a DistributedDataParallel, whose parameters do not change


def prepare_ddp(model: nn.Module, replicas: Any = None) -> nn.Module:
    """Make ``DistributedDataParallel(model)`` leave the experts of ``model`` alone, and reduce their gradients here.

    DistributedDataParallel copies rank 0's parameters to all ranks and averages all gradients; experts differ between
    ranks. It leaves out the parameters that its root module names, so ``model`` must be the module that it gets::

        model = DistributedDataParallel(prepare_ddp(model, mesh["dp"]))

    Gradients of experts become what those of the other parameters become: the mean over all ranks of the gradients of
    each rank's loss. They are reduced in every backward pass, under ``no_sync`` too, before they are added to ``grad``;
    the sums over several passes are the same.

    Call it once, on all ranks, after the parameters are on their device. It copies the experts of the first of the
    replicas to the others.

    Args:
        model: contains :class:`MoELayer` or :class:`GroupedExperts` modules.
        replicas: the ranks that hold the same experts as this one: a DeviceMesh of one dimension or a process group.
            None: there are no others.

    Returns:
        ``model``.
    """
    group = replicas.get_group() if hasattr(replicas, "get_group") else replicas
    ignored = list(getattr(model, _IGNORED, ()))
    for prefix, experts in _experts(model):
        experts.gradient_divisor = experts.num_ranks
        for name, parameter in experts.named_parameters():
            ignored += {_full_name(prefix, name), f"{prefix}.{name}"}  # the reducer names a root's parameter ".name"
            if group is not None and local(parameter).numel():
                parameter.register_hook(partial(_mean, group=group))
                dist.broadcast(local(parameter.detach()), dist.get_global_rank(group, 0), group=group)
    setattr(model, _IGNORED, ignored)
    return model


def _mean(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    gradient = gradient / dist.get_world_size(group)
    dist.all_reduce(local(gradient), group=group)
    return gradient


@torch.compiler.assume_constant_result  # a compiler calls it once, while it traces the first forward pass
def check_ddp() -> None:
    """Refuse the forward pass of a DistributedDataParallel that does not leave out the experts in its module.

    Raises:
        EPError: names the experts and the remedy.
    """
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or _CHECKED in ddp.__dict__:
        return
    for prefix, experts in _experts(ddp.module):
        for name, _ in experts.named_parameters():
            if _full_name(prefix, name) not in ddp.parameters_to_ignore:
                raise EPError(
                    f"DistributedDataParallel takes {_full_name(prefix, name)} to be the same on all ranks: it has "
                    "overwritten this rank's experts by those of its first rank, and would average their gradients. "
                    "Build the model anew and wrap it by DistributedDataParallel(deep_ep_py.nn.prepare_ddp(model, ...))"
                )
    ddp.__dict__[_CHECKED] = True


def _experts(model: nn.Module) -> Iterator[tuple[str, GroupedExperts]]:
    """With their names; those that are whole on every rank are ordinary parameters."""
    for name, module in model.named_modules():
        if isinstance(module, GroupedExperts) and module.num_ranks > 1:
            yield name, module


def _full_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
