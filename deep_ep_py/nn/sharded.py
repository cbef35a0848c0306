"""Parameters of which a rank holds a part: torch's DTensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def sharded(part: torch.Tensor, num_rows: int, mesh: DeviceMesh) -> torch.Tensor:
    """The DTensor of ``num_rows`` rows of which this rank holds ``part``: ``Shard(0)`` over a mesh of one dimension."""
    from torch.distributed.tensor import DTensor, Shard  # imported where it is used: it takes a second

    shape = torch.Size((num_rows, *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def sharded_as(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The DTensor that is sharded as ``like`` and of which this rank holds ``part``; ``part`` for a plain ``like``."""
    if type(like) in _PLAIN:
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = like
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, differentiable; any other tensor as it is."""
    if type(tensor) in _PLAIN:
        return tensor
    part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def position(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole, for any placements of a DTensor."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))


@torch.no_grad()
def draw_normal_(weight: torch.Tensor, std: float) -> None:
    """``nn.init.normal_`` of the whole tensor, of which each rank keeps its part.

    So the values follow from the random state alone. (For a DTensor, ``nn.init.normal_`` draws each part by itself.)
    """
    if weight.is_meta:
        return
    part = local(weight)
    whole = part if part is weight else torch.empty(weight.shape, dtype=part.dtype, device=part.device)
    torch.nn.init.normal_(whole, std=std)
    if part is not weight:
        part.copy_(whole[position(weight)])


def parameters_by_mesh(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The parameters in groups: plain tensors, and the DTensors of each mesh. Order is kept; no group is empty.

    torch refuses to mix them in one operation over many tensors. An optimizer with ``foreach=True`` or ``fused=True``
    works on each of its parameter groups by itself::

        torch.optim.AdamW([{"params": p} for p in parameters_by_mesh(model.parameters())], foreach=True)
    """
    groups: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())
