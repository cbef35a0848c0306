"""How an operation becomes an operator of torch: kernel, fake kernel and gradient; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .validate import is_tracing, is_usable

Kernel = Callable[..., Sequence[torch.Tensor]]

NAMESPACE = "deep_ep_py"
# The registrations live as long as this object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """One operator, returning a list of tensors; called with positional arguments.

    Args:
        name: below ``torch.ops.deep_ep_py``.
        schema: its arguments, as torch.library writes them; tensors come first.
        kernel: the operation. fake: shapes and dtypes alone.
        save: ``save(ctx, inputs, outputs)``, and backward: ``backward(ctx, gradients of the outputs) -> those of the
            inputs``; None: not differentiable.

    In an eager call without modes in between, the kernel or an autograd function made of the same parts is called
    directly: passing the dispatcher costs as much as the rest of a small call (docs/architecture.md has figures). So is
    it with a tensor of a class that operations of torch are sent to: the kernel waits for the result of a functional
    collective, and refuses others, on every rank. The dispatcher would send such a call elsewhere, on this rank alone.
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
        # Opaque to a compiler that is watching the frames around a graph break; what custom_op does for its kernels.
        _library.impl(name, torch._disable_dynamo(kernel), "CompositeExplicitAutograd")  # type: ignore[attr-defined]
        torch.library.register_fake(qualified, fake, lib=_library)
        self._kernel = kernel
        self._num_tensors = schema.count("Tensor")
        self._apply: Any = None
        if save is not None and backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=save, lib=_library)
            # Function.apply itself is Python around this; what it adds is for functorch's transforms, see __call__.
            function = _function(name, self._num_tensors, kernel, save, backward)
            self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        # A collective whose result nobody uses here still serves the other ranks: not to be dropped. (Reductions over
        # no rows are constants to inductor, so on a rank without tokens such results do occur.)
        torch.fx.node.has_side_effect(self._operator)

    def __call__(self, *arguments: Any) -> Sequence[torch.Tensor]:
        if torch.compiler.is_compiling() or _transforms_active() or (_num_modes() and self._is_dispatched(arguments)):
            return self._operator(*arguments)  # type: ignore[no-any-return]
        if self._apply is not None and torch.is_grad_enabled():
            n = self._num_tensors
            for tensor in arguments[:n]:
                if getattr(tensor, "requires_grad", False):
                    return self._apply(*arguments[:n], arguments[n:])  # type: ignore[no-any-return]
        return self._kernel(*arguments)

    def _is_dispatched(self, arguments: tuple[Any, ...]) -> bool:
        """Whether modes see this call: they trace it, or its tensors are such as the kernel takes."""
        tensors = [tensor for tensor in arguments[: self._num_tensors] if isinstance(tensor, torch.Tensor)]
        return is_tracing() or all(is_usable(tensor) for tensor in tensors)


_num_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active


def _function(name: str, num_tensors: int, kernel: Kernel, save: Any, backward: Any) -> Any:
    """The numbers travel as one tuple: torch looks at each argument of `apply`."""

    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        # Not as `setup_context`: with one, torch inspects the signature of `forward` in every call.
        inputs = (*arguments[:-1], *arguments[-1])
        found = tuple(kernel(*inputs))
        save(ctx, inputs, found)
        return found

    def undo(ctx: Any, *gradients: Any) -> Any:
        return *backward(ctx, gradients)[:num_tensors], None

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(undo)})
