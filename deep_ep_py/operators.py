"""How an operation becomes an operator of torch: kernel, fake kernel and gradient; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from .traced import keep_order, returning_order
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
            first inputs``, None for the others; both None: not differentiable.

    In an eager call without modes in between, the kernel or an autograd function made of the same parts is called
    directly: passing the dispatcher costs as much as the rest of a small call (docs/architecture.md has figures). So is
    it with a tensor of a class that operations of torch are sent to: the kernel waits for the result of a functional
    collective, and refuses others, on every rank. The dispatcher would send such a call elsewhere, on this rank alone.

    Every operator has one more argument, ``after``, which only traced programs give: see `traced.py`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        kernel: Kernel,
        fake: Kernel,
        save: Callable[[Any, Any, Any], None] | None = None,
        backward: Callable[[Any, Sequence[torch.Tensor | None]], Sequence[torch.Tensor | None]] | None = None,
    ) -> None:
        qualified = f"{NAMESPACE}::{name}"
        # Compilers keep the strides of tensors that they pass: torch's default, said because lowerings ask for it.
        tags = (torch.Tag.needs_exact_strides,)
        _library.define(f"{name}({schema}, Tensor? after=None) -> Tensor[]", tags=tags)
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        num_arguments = len(self._operator._schema.arguments) - 1
        # Opaque to a compiler that is watching the frames around a graph break; what custom_op does for its kernels.
        opaque = torch._disable_dynamo(returning_order(kernel, num_arguments))  # type: ignore[attr-defined]
        _library.impl(name, opaque, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, returning_order(fake, num_arguments), lib=_library)
        torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, keep_order, lib=_library)
        self._kernel = kernel
        self._num_tensors = schema.count("Tensor")
        self._apply: Any = None
        if save is not None and backward is not None:
            whole = _for_all_inputs(backward)
            torch.library.register_autograd(qualified, whole, setup_context=save, lib=_library)
            # Function.apply itself is Python around this; what it adds is for functorch's transforms, see __call__.
            function = _function(name, kernel, save, whole)
            self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
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


def _for_all_inputs(backward: Any) -> Any:
    def whole(ctx: Any, gradients: Sequence[torch.Tensor | None]) -> Any:
        found = backward(ctx, gradients)
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    return whole


def _function(name: str, kernel: Kernel, save: Any, backward: Any) -> Any:
    """The numbers travel as one tuple: torch looks at each argument of `apply`."""

    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        # Not as `setup_context`: with one, torch inspects the signature of `forward` in every call.
        inputs = (*arguments[:-1], *arguments[-1])
        found = tuple(kernel(*inputs))
        save(ctx, inputs, found)
        return found

    def undo(ctx: Any, *gradients: Any) -> Any:
        return backward(ctx, gradients)

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(undo)})
