"""How an operation becomes an operator of torch: kernel, fake kernel and gradient; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Kernel = Callable[..., Sequence[torch.Tensor]]

NAMESPACE = "deep_ep_py"
# The registrations live as long as this object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """One operator, returning a list of tensors; called with positional arguments.

    Args:
        name: below ``torch.ops.deep_ep_py``.
        schema: its arguments, as torch.library writes them.
        kernel: the operation. fake: shapes and dtypes alone.
        save: ``save(ctx, inputs, outputs)``, and backward: ``backward(ctx, gradients of the outputs) -> those of the
            inputs``; None: not differentiable.

    In an eager call without modes in between, the kernel or an autograd function made of the same parts is called
    directly: passing the dispatcher costs as much as the rest of a small call (docs/architecture.md has figures).
    """

    def __init__(
        self,
        name: str,
        schema: str,
        kernel: Kernel,
        fake: Kernel,
        save: Callable[[Any, Any, Any], None] | None = None,
        backward: Callable[[Any, Sequence[torch.Tensor | None]], Any] | None = None,
    ) -> None:
        qualified = f"{NAMESPACE}::{name}"
        _library.define(f"{name}{schema} -> Tensor[]")
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        self._kernel = kernel
        self._function: Any = None
        if save is not None and backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=save, lib=_library)
            self._function = _function(name, kernel, save, backward)
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, first: torch.Tensor | None, *rest: Any) -> Sequence[torch.Tensor]:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(first) not in _PLAIN:
            return self._operator(first, *rest)  # type: ignore[no-any-return]
        if self._function is not None and torch.is_grad_enabled() and _requires_grad(first, *rest):
            return self._function.apply(first, *rest)  # type: ignore[no-any-return]
        return self._kernel(first, *rest)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _requires_grad(*arguments: Any) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def _function(name: str, kernel: Kernel, save: Any, backward: Any) -> Any:
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        # Not as `setup_context`: with one, torch inspects the signature of `forward` in every call.
        found = tuple(kernel(*arguments))
        save(ctx, arguments, found)
        return found

    parts = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *gradients: backward(ctx, gradients)),
    }
    return type(name, (torch.autograd.Function,), parts)
