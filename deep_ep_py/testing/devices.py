"""Checks are written for tensors on the CPU; a buffer on a GPU is called through a :class:`Carrier`."""

from __future__ import annotations

from typing import Any

import torch


def carried(buffer: Any) -> Any:
    """``buffer`` as a check calls it: itself where its tensors lie on the CPU."""
    device = buffer._engine.device
    return buffer if device.type == "cpu" else Carrier(buffer, device)


def carry(value: Any, device: torch.device) -> Any:
    """Every tensor in ``value`` on ``device``, gaps between elements kept; anything else as it is."""
    if isinstance(value, torch.Tensor):
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        moved.copy_(value)
        return moved
    if isinstance(value, tuple | list):
        return type(value)(carry(v, device) for v in value)
    return value


class Carrier:
    """Carries arguments to the buffer's device and what it returns to the CPU. Handles that are objects stay as they
    are; those that are tuples of tensors travel, which their contents must bear."""

    def __init__(self, buffer: Any, device: torch.device) -> None:
        self.buffer, self.device = buffer, device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.buffer, name)
        if name not in ("dispatch", "combine", "get_dispatch_layout"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            moved = {key: carry(value, self.device) for key, value in kwargs.items()}
            return carry(found(*carry(args, self.device), **moved), torch.device("cpu"))

        return call
