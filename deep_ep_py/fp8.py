"""Rows to fp8 with scale factors, as dispatch carries them: ``buffer.dispatch(cast_rows(x), ...)``."""

from __future__ import annotations

import torch

from .backends import _cuda_library
from .backends._dtypes import ROW_TYPES
from .errors import EPArgumentError

#: The largest finite e4m3, and the smallest maximum that a scale is made for, as DeepEP has it:
#: ``max(amax, 1e-4) / 448``.
LARGEST, SMALLEST_MAXIMUM = 448.0, 1e-4


def cast_rows(
    x: torch.Tensor, *, channels: int | None = 128, round_scale: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows: ``x[t, c] ~ rows[t, c] * scales[t, c // channels]``.

    Args:
        x: [T, H] bf16, fp16 or float32, unit stride in a row.
        channels: columns that share a scale; None: one scale for each row.
        round_scale: scales are the powers of two above, which a product leaves exact.

    Returns:
        rows [T, H] float8_e4m3fn, rounded to nearest even and saturated; scales [T, ceil(H / channels)] float32,
        ``max(amax, 1e-4) / 448`` of their columns.

    Raises:
        EPArgumentError: another dtype or shape, or no channels.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise EPArgumentError.of("x", "bfloat16, float16 or float32 of two dimensions", got)
    width = max(x.shape[1], 1) if channels is None else channels
    if width < 1:
        raise EPArgumentError.of("channels", "a positive number of columns, or None", channels)
    if x.is_cuda and _cuda_library.built():
        return _cast_on_device(x if x.stride(1) == 1 else x.contiguous(), width, round_scale)
    num_rows, hidden = x.shape
    groups = -(-hidden // width)
    padded = torch.nn.functional.pad(x.float(), (0, groups * width - hidden)).view(num_rows, groups, width)
    scales = padded.abs().amax(2).clamp(min=SMALLEST_MAXIMUM) / LARGEST
    if round_scale:
        scales = _power_above(scales)
    rows = (padded / scales[:, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return rows.view(num_rows, groups * width)[:, :hidden].contiguous(), scales


def _power_above(scales: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below; on the bits, where no logarithm rounds."""
    bits = scales.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _cast_on_device(x: torch.Tensor, width: int, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, hidden = x.shape
    rows = torch.empty((num_rows, hidden), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_rows, -(-hidden // width)), dtype=torch.float32, device=x.device)
    _cuda_library.opened(_cuda_library.path()).cast(
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        device=x.device.index,
        x=x.data_ptr(),
        x_stride_bytes=x.stride(0) * x.element_size(),
        num_rows=num_rows,
        hidden=hidden,
        channels=width,
        dtype=ROW_TYPES[x.dtype],
        round_scale=round_scale,
        out=rows.data_ptr(),
        scales=scales.data_ptr(),
    )
    return rows, scales
