"""Checks of what users pass, shared by the faces. Each names the argument, what is wanted and what came."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from .errors import EPArgumentError

_COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
_STRIDED = torch.strided
_PAIR = (tuple, list)
# How a tensor of such a dtype may be marked to be something else than what lies in its memory.
_MARKS: dict[torch.dtype, Callable[[torch.Tensor], bool]] = {
    **dict.fromkeys((torch.float16, torch.float32, torch.float64), torch.Tensor.is_neg),
    **dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), torch.Tensor.is_conj),
    **{getattr(torch, name): lambda _: True for name in ("qint8", "quint8", "qint32") if hasattr(torch, name)},
}
_TRACING = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def describe(value: object) -> str:
    """A tensor as dtype, shape and device, with its class and layout where they are unusual; else type and value."""
    if isinstance(value, torch.Tensor):
        kind = "" if type(value) in _PLAIN else f"{type(value).__name__} "
        layout = "" if value.layout is torch.strided else f"{value.layout} "
        shape = "nested" if value.is_nested else list(value.shape)
        return f"{kind}{layout}{value.dtype} {shape} on {value.device}"
    return "None" if value is None else f"{type(value).__name__} {value!r}"


def missing(name: str) -> EPArgumentError:
    """An argument was left out for which only a handle would make up."""
    return EPArgumentError(f"{name} is required without a handle", argument=name, expected="a value", got="None")


def plain(name: str, value: Any) -> Any:
    """The tensor whose own memory holds what ``value`` is, for kernels that read memory. What is no tensor comes back.

    The result of a functional collective (AsyncCollectiveTensor) is waited for; a subclass that leaves operations to
    torch is read as the tensor that it is.

    Raises:
        EPArgumentError: a tensor that keeps its values elsewhere or in another form (DTensor, FakeTensor, sparse,
            nested, quantised, conjugated, ...), with what to pass instead.
    """
    if type(value) in _PLAIN and value.layout is _STRIDED and not value.is_nested:
        marked = _MARKS.get(value.dtype)
        if marked is not None and marked(value):
            raise _not_plain(name, value)
        return value
    if not isinstance(value, torch.Tensor):
        return value
    if is_async_collective(value):
        return plain(name, value.wait())  # type: ignore[attr-defined]
    if type(value) in _PLAIN or not _holds_its_data(value):
        raise _not_plain(name, value)
    with torch._C.DisableTorchFunctionSubclass():
        return plain(name, value.as_subclass(torch.Tensor))


def is_usable(tensor: torch.Tensor) -> bool:
    """Whether :func:`plain` can make something of a tensor's class."""
    return type(tensor) in _PLAIN or is_async_collective(tensor) or _holds_its_data(tensor)


def is_tracing(*keys: Any) -> bool:
    """Whether a mode is active in which tensors have no values or operations are recorded: FakeTensorMode, make_fx,
    functionalisation; with ``keys`` one of these."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in keys or _TRACING)


def is_async_collective(value: object) -> bool:
    """Whether ``value`` is what a functional collective returns. Its module is loaded where there is one."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    return module is not None and isinstance(value, module.AsyncCollectiveTensor)


def _holds_its_data(value: torch.Tensor) -> bool:
    """Whether a subclass is a tensor with memory, and not a wrapper around something else."""
    if type(value).__torch_dispatch__ is not _NO_DISPATCH:
        return False
    try:
        return value.numel() == 0 or value.data_ptr() != 0
    except RuntimeError:
        return False


def _not_plain(name: str, value: torch.Tensor) -> EPArgumentError:
    if hasattr(value, "to_local"):
        remedy = "pass its local part, to_local()"
    elif value.is_nested:
        remedy = "pass rows without padding, values() of a jagged one"
    elif value.layout is not torch.strided:
        remedy = "pass to_dense()"
    elif value.is_quantized:
        remedy = "pass int_repr() or dequantize()"
    elif type(value) in _PLAIN:
        remedy = "pass resolve_neg().resolve_conj()"
    elif type(value).__name__ == "FakeTensor":
        remedy = "this one has no values; under FakeTensorMode the operators deep_ep_py.dispatch and combine take it"
    else:
        remedy = f"unwrap what the {type(value).__name__} holds"
    return EPArgumentError.of(name, f"a plain tensor; {remedy}", describe(value))


def matrix(
    name: str, value: Any, device: torch.device, rows: int | None = None, columns: int | None = None
) -> torch.Tensor:
    """A tensor [rows, columns] on the device whose rows are dense; copied only if they are not."""
    found = plain(name, value)
    if not isinstance(found, torch.Tensor) or found.device != device or found.dim() != 2:
        raise EPArgumentError.of(name, f"a tensor of two dimensions on {device}", describe(value))
    have_rows, have_columns = found.shape
    if (rows is not None and have_rows != rows) or (columns is not None and have_columns != columns):
        wanted = [rows if rows is not None else "any", columns if columns is not None else "any"]
        raise EPArgumentError.of(name, f"shape {wanted}", describe(value))
    # Not .contiguous(): an empty or a one-column tensor counts as contiguous whatever its strides are.
    return found if found.stride(1) == 1 else found.clone(memory_format=torch.contiguous_format)


def tensor(
    name: str, value: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> torch.Tensor:
    """A contiguous tensor of exactly this dtype on the device; None in ``shape`` means any length."""
    found = plain(name, value)
    fits = isinstance(found, torch.Tensor) and found.dtype == dtype and found.device == device
    if fits and (have := found.shape) != shape:
        fits = len(have) == len(shape)
        for want, n in zip(shape, have, strict=False):
            fits = fits and (want is None or want == n)
    if not fits:
        wanted = [n if n is not None else "any" for n in shape]
        raise EPArgumentError.of(name, f"{dtype} {wanted} on {device}", describe(value))
    result: torch.Tensor = found if found.is_contiguous() else found.contiguous()
    return result


def floats(
    name: str, value: Any, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> torch.Tensor:
    """A contiguous tensor of one of these dtypes on the device; None in ``shape`` means any length."""
    dtype = getattr(value, "dtype", None)
    return tensor(name, value, device, dtype if dtype in dtypes else dtypes[0], shape)


def tokens(x: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x``: [T, H], or a tuple ([T, H] fp8, [T, S] scale factors)."""
    if isinstance(x, _PAIR):
        if len(x) != 2:
            raise EPArgumentError.of("x", "a tensor or a pair (x, scale factors)", f"{len(x)} items")
        rows = _wide("x[0]", x[0], device)
        sf = matrix("x[1]", x[1], device, rows=rows.shape[0]).contiguous()
        if sf.element_size() != 4:
            raise EPArgumentError.of("x[1]", "scale factors of 4 bytes (float32 or int32)", describe(sf))
        return rows, sf
    return _wide("x", x, device), None


def _wide(name: str, x: Any, device: torch.device) -> torch.Tensor:
    rows = matrix(name, x, device)
    if rows.shape[1] == 0:
        raise EPArgumentError.of(name, "at least one column", describe(x))
    return rows


def whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    """A whole number from ``low`` to ``high``; flags may be ints and ints may be numpy's."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = low - 1
    if not low <= number <= high or number != value:
        raise EPArgumentError.of(name, f"a whole number from {low} to {high}", describe(value))
    return number


def seconds(name: str, value: Any) -> float:
    """A positive number of seconds."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not number > 0:
        raise EPArgumentError.of(name, "a positive number of seconds", describe(value))
    return number


def combine_rows(x: Any, device: torch.device, rows: int, delivered: str) -> torch.Tensor:
    """``x`` of a combine: [rows, H] of a dtype that can be summed."""
    y = _wide("x", x, device)
    if y.shape[0] != rows:
        raise EPArgumentError.of("x", f"{rows} rows, as {delivered} delivered", describe(y))
    if y.dtype not in _COMBINE_DTYPES:
        raise EPArgumentError.of("x", f"one of {[str(d) for d in _COMBINE_DTYPES]}", describe(y))
    return y


def biases(bias: Any, like: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """None, one tensor or a pair, each [T, H] of the rows' dtype."""
    if bias is None:
        return ()
    given = tuple(bias) if isinstance(bias, tuple | list) else (bias,)
    if not 1 <= len(given) <= 2:
        raise EPArgumentError.of("bias", "None, a tensor or a pair of tensors", f"{len(given)} tensors")
    return tuple(tensor("bias", b, like.device, like.dtype, (num_tokens, like.shape[1])) for b in given)
