"""What compilers have to know of exchanges: their order, what is not recomputed, and what is not traced at all.

Exchanges that do not depend on each other by data must keep one order on all ranks, and compilers reorder what does not
depend on each other. So while AOTAutograd traces a program, every operator also takes a small tensor that the operator
before it returned. Forward and backward passes have a chain each: with one for both, recomputing a checkpointed region
would require the results of the exchange before the region.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from .errors import EPError

#: The order was tried with this release of torch and with 2.14.1.
COMPILES_FROM = "2.13"

Kernel = Callable[..., Sequence[torch.Tensor]]
Class = TypeVar("Class", bound=type)

_ORDER = "_deep_ep_py_order"  # what holds the last tensor of a chain


def is_traced(tensor: Any) -> bool:
    """Whether AOTAutograd traces the program that ``tensor`` is of."""
    return isinstance(tensor, FunctionalTensor)


def returning_order(kernel: Kernel, num_arguments: int) -> Kernel:
    """``kernel`` with one more argument, ``after``; where it is given, a tensor like it is returned last."""

    def ordered(*arguments: Any) -> Sequence[torch.Tensor]:
        found = kernel(*arguments[:num_arguments])
        after = arguments[num_arguments] if len(arguments) > num_arguments else None
        return found if after is None else [*found, after.new_zeros(1)]

    return ordered


def keep_order(mode: Any, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
    """The rule by which AOTAutograd traces an operator (a torch dispatch rule for its functionalization).

    Raises:
        EPError: this release of torch is too old.
    """
    if torch.__version__ < COMPILES_FROM:
        raise EPError(
            f"deep_ep_py's operators cannot be compiled with torch {torch.__version__}: exchanges might be reordered. "
            f"Use torch {COMPILES_FROM} or later, or keep the call out of compiled functions by torch.compiler.disable."
        )
    _lower_in_order(operator)
    _weigh_meshes()
    backward = torch._C._current_autograd_node() is not None
    chains: dict[bool, torch.Tensor] = mode.__dict__.setdefault(_ORDER, {})
    if backward not in chains:
        with mode:
            chains[backward] = arguments[0].new_zeros(1, dtype=torch.float32)
    proxies = get_proxy_mode()
    graph = None if proxies is None else proxies.tracer.graph
    count = 0 if graph is None else len(graph.nodes)
    found = mode.__torch_dispatch__(operator, types, arguments, {**(options or {}), "after": chains[backward]})
    chains[backward] = found[-1]
    if "recompute" in traceback.current_meta:
        # Between two checkpointed regions the partitioner saves tensors, but not one of several results of one node:
        # recomputing the second region would repeat the last exchange of the first. A clone, inductor would remove.
        with mode:
            chains[backward] = found[-1] + 1
    elif graph is not None and not backward:
        _save_results(islice(reversed(graph.nodes), len(graph.nodes) - count))
    return found[:-1]


def _save_results(nodes: Iterable[Any]) -> None:
    """Outside checkpointed regions no exchange is recomputed, whatever memory budget the compiler has."""
    from torch._functorch import config

    for node in nodes:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        if config.activation_memory_budget == 0:  # saves nothing but inputs, whatever is marked; a tiny budget does not
            node.meta["memory_budget"] = 1e-9


def _weigh_meshes() -> None:
    """The mesh of a DTensor parameter is an input of the graph. Under a memory budget torch weighs every input, and
    refuses objects that might hold tensors, unless it is told that they weigh nothing. A mesh holds none."""
    from torch._functorch import config

    if config.activation_memory_budget != 1 and hasattr(config, "unsafe_treat_script_objects_as_zero_size"):
        config.unsafe_treat_script_objects_as_zero_size = True


def _lower_in_order(operator: Any) -> None:
    """Inductor orders by data. In a backward graph, recomputed exchanges and those of gradients have a chain each, and
    the order of the graph's nodes alone tells how they interleave: inductor is given one chain of all of them."""
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in lowering.lowerings:
        return
    fallback = lowering.fallback_handler(operator)

    def in_order(*arguments: Any) -> Any:
        *rest, after = arguments
        graph = lowering.V.graph
        found = fallback(*rest, getattr(graph, _ORDER, after))
        setattr(graph, _ORDER, found[-1])
        return found

    lowering.register_lowering(operator, type_promotion_kind=None)(in_order)


def untraced(cls: Class) -> Class:
    """Dynamo traces no public method of the class: a call in a compiled function is one graph break.

    The methods are marked, not wrapped as ``torch.compiler.disable`` does: an eager call costs the same as before, and
    ``torch._dynamo`` is not imported.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    for name, member in vars(cls).items():
        function: Any = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if isinstance(function, FunctionType) and not name.startswith("_"):
            function._torchdynamo_disable = True  # type: ignore[attr-defined]
            function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
                f"{cls.__name__}.{name} is a collective call of a library; torch.ops.deep_ep_py has what can be traced"
            )
            # Neither its frame nor those below, where dynamo watches frames after a graph break.
            frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return cls
