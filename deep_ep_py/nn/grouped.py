"""Matrix products of groups of rows, each group with a matrix of its own."""

from typing import Any

import torch
import torch.nn.functional as F


def grouped_mm(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """``y[offs[e - 1] : offs[e]] = x[offs[e - 1] : offs[e]] @ w[e]`` for each group e, differentiable in x and w.

    torch's own kernel runs where it takes these operands (bf16, fp16 and float32, sizes that are multiples of 16 bytes,
    torch 2.10 or newer; compiled, bf16 only). Elsewhere a loop over the groups runs, behind an operator, because it has
    to read ``offs`` on the host (once) and ``torch.compile`` must not look inside. On a CPU both multiply group by
    group; with many small groups torch's kernel is up to twice as fast. On a GPU torch's kernel runs bf16 rows without
    the host; its gradient in w wants groups that start at multiples of 16 bytes' worth of rows (8 of bf16).

    Args:
        x: [N, M] rows, sorted by group; any float dtype.
        w: [G, M, P], of x's dtype; groups without rows are fine (their gradient is zero), and so is G = 0.
        offs: [G] int32, inclusive end row of each group, ascending. Rows from ``offs[-1]`` on belong to no group:
            what y holds there is undefined.

    Returns:
        [N, P] of x's dtype.
    """
    if _torch_takes(x, w):
        return F.grouped_mm(x, w, offs=offs)
    result: torch.Tensor = _grouped_mm(x, w, offs)
    return result


def _torch_takes(x: torch.Tensor, w: torch.Tensor) -> bool:
    if x.dtype is torch.float16 or x.dtype is torch.float32:
        fits = not torch.compiler.is_compiling()  # torch's shape function, which only compilation asks, wants bf16
    else:
        fits = x.dtype is torch.bfloat16
    return fits and hasattr(F, "grouped_mm") and all(size * x.element_size() % 16 == 0 for size in w.shape[1:])


@torch.library.custom_op("deep_ep_py::grouped_mm", mutates_args=())
def _grouped_mm(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], w.shape[2])
    start = 0
    for e, end in enumerate(offs.tolist()):
        torch.mm(x[start:end], w[e], out=y[start:end])
        start = end
    return y


@torch.library.custom_op("deep_ep_py::grouped_outer", mutates_args=())
def _grouped_outer(x: torch.Tensor, y: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """[G, M, P]: ``x[rows of e].T @ y[rows of e]`` for each group e."""
    w = x.new_empty(offs.shape[0], x.shape[1], y.shape[1])
    start = 0
    for e, end in enumerate(offs.tolist()):
        torch.mm(x[start:end].t(), y[start:end], out=w[e])
        start = end
    return w


@_grouped_mm.register_fake
def _(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], w.shape[2])


@_grouped_outer.register_fake
def _(x: torch.Tensor, y: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return x.new_empty(offs.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _mm_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, w, offs = ctx.saved_tensors
    dx = _grouped_mm(dy, w.transpose(1, 2), offs) if ctx.needs_input_grad[0] else None
    dw = _grouped_outer(x, dy, offs) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _outer_backward(ctx: Any, dw: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, y, offs = ctx.saved_tensors
    dx = _grouped_mm(y, dw.transpose(1, 2), offs) if ctx.needs_input_grad[0] else None
    dy = _grouped_mm(x, dw, offs) if ctx.needs_input_grad[1] else None
    return dx, dy, None


_grouped_mm.register_autograd(_mm_backward, setup_context=_save)
_grouped_outer.register_autograd(_outer_backward, setup_context=_save)
