"""Tensors that say they lie on a GPU, and lie on the CPU: what CUDA refuses to mix they refuse to mix, and no address
of theirs can be had. With them, code for device tensors runs where there is no device, on real numbers.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
_MAY_CROSS = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class StandIn(torch.Tensor):
    """``inner``, as if on the GPU."""

    @staticmethod
    def __new__(cls, inner):
        # "meta" below: of a GPU torch would want a driver before it slices.
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta"
        )

    def __init__(self, inner):
        assert inner.is_cpu
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        raise AssertionError("an address of the GPU's memory was asked for by code of the CPU")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors: list[torch.Tensor] = []
        tree_map(lambda t: tensors.append(t) if isinstance(t, torch.Tensor) else None, (args, kwargs))
        strays = [t for t in tensors if not isinstance(t, StandIn) and t.dim() > 0]
        assert func in _MAY_CROSS or not strays, f"{func} got tensors of the CPU and of the GPU"
        to = torch.device(kwargs.pop("device", None) or GPU)
        inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, StandIn) else t, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        written = func._schema.arguments[0].alias_info
        if written is not None and written.is_write:
            return args[0]  # in place
        on_gpu = to.type != "cpu"
        return tree_map(lambda t: StandIn(t) if on_gpu and isinstance(t, torch.Tensor) else t, out)


class OnStandIns(TorchFunctionMode):
    """Makes tensors on the GPU stand-ins. Of one thread."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.device):
            place = args[1]
            t = func(args[0], *args[2:], **kwargs) if len(args) > 2 or kwargs else args[0]
            if place.type == "cuda":
                return t if isinstance(t, StandIn) else StandIn(t.clone())
            return t.cpu()
        if func in (torch.where, torch.Tensor.__setitem__) and not isinstance(args[2], torch.Tensor):
            # Torch would put the number on the "meta" device, where it is lost.
            like = args[1] if func is torch.where else args[0]
            args = (*args[:2], torch.tensor(args[2], dtype=like.dtype))
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
            return StandIn(func(*args, **kwargs))
        return func(*args, **kwargs)


def to_gpu(value):
    """A tensor, or anything else as it is."""
    return StandIn(value.clone()) if isinstance(value, torch.Tensor) and not isinstance(value, StandIn) else value


def back(value):
    """What lies behind; fails for a tensor that is on the CPU."""
    if value is None:
        return None
    assert isinstance(value, StandIn), f"on {value.device}"
    return value.inner
