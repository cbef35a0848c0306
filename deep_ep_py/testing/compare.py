"""Bit for bit comparison: -0.0 is not +0.0, and a NaN equals only its own bits unless the caller says otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """``x`` as integers of the same width."""
    return x.contiguous().view(_INTEGERS[x.dtype.itemsize])


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, what: str, *, any_nan: bool = False) -> None:
    """Same dtype, shape and bits (or both None), ``actual`` on any device. ``any_nan``: all NaNs are equal.

    Raises:
        AssertionError: with the number of differing elements, the first one's index and both values.
    """
    if actual is None or expected is None:
        assert actual is expected, f"{what}: {_describe(actual)}, expected {_describe(expected)}"
        return
    actual = actual.cpu()
    same_kind = actual.dtype == expected.dtype and actual.shape == expected.shape
    assert same_kind, f"{what}: {_describe(actual)}, expected {_describe(expected)}"
    differs = bits(actual) != bits(expected)
    if any_nan:
        differs &= ~(actual.isnan() & expected.isnan())
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at {list(first)}: "
            f"{actual[first].item()!r}, expected {expected[first].item()!r}"
        )


def _describe(x: Tensor | None) -> str:
    return "None" if x is None else f"{x.dtype} {list(x.shape)}"
