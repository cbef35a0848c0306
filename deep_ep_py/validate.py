"""Checks of what users pass, shared by the faces. Each names the argument, what is wanted and what came."""

from __future__ import annotations

from typing import Any

import torch

from .errors import EPArgumentError

_COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """A tensor as dtype, shape and device; anything else by its type and value."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def matrix(
    name: str, value: Any, device: torch.device, rows: int | None = None, columns: int | None = None
) -> torch.Tensor:
    """A tensor [rows, columns] on the device whose rows are dense; copied only if they are not."""
    if not isinstance(value, torch.Tensor) or value.device != device or value.dim() != 2:
        raise EPArgumentError.of(name, f"a tensor of two dimensions on {device}", describe(value))
    have_rows, have_columns = value.shape
    if (rows is not None and have_rows != rows) or (columns is not None and have_columns != columns):
        wanted = [rows if rows is not None else "any", columns if columns is not None else "any"]
        raise EPArgumentError.of(name, f"shape {wanted}", describe(value))
    # Not .contiguous(): an empty or a one-column tensor counts as contiguous whatever its strides are.
    return value if value.stride(1) == 1 else value.clone(memory_format=torch.contiguous_format)


def tensor(
    name: str, value: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> torch.Tensor:
    """A contiguous tensor of exactly this dtype on the device; None in ``shape`` means any length."""
    fits = isinstance(value, torch.Tensor) and value.dtype == dtype and value.dim() == len(shape)
    fits = fits and value.device == device
    if fits:
        for want, have in zip(shape, value.shape, strict=True):
            fits = fits and (want is None or want == have)
    if not fits:
        wanted = [n if n is not None else "any" for n in shape]
        raise EPArgumentError.of(name, f"{dtype} {wanted} on {device}", describe(value))
    result: torch.Tensor = value if value.is_contiguous() else value.contiguous()
    return result


def floats(
    name: str, value: Any, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> torch.Tensor:
    """A contiguous tensor of one of these dtypes on the device; None in ``shape`` means any length."""
    dtype = value.dtype if isinstance(value, torch.Tensor) and value.dtype in dtypes else dtypes[0]
    return tensor(name, value, device, dtype, shape)


def tokens(x: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x``: [T, H], or a tuple ([T, H] fp8, [T, S] scale factors)."""
    if isinstance(x, tuple | list):
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
