"""What the autograd ops cost over plain ElasticBuffer calls, and where it goes. One process, one rank, a tiny shape.

    python benchmarks/bench_op_path.py --json out.json
    python benchmarks/bench_op_path.py --markdown out.json

Nothing waits for a peer and next to nothing is copied, so that what is left is the way there. Every call is measured in
rounds, all of them in turn; a figure is the median over rounds, an addition the median of differences inside a round.
Wall time, and beside it the time that the calling thread ran (``time.thread_time``), which other load disturbs less.

Lines
    "no grad": torch.no_grad(); "grad": x, weights, y require gradients, the graph is built and dropped.
    "dispatcher": ``torch.ops.deep_ep_py.*.default``, as compiled code and modes call it, in place of the direct way of
    an eager call (deep_ep_py/operators.py). The addition is over the plain call above.
    "and backward": against a plain dispatch and a plain combine with weights, which is what it does.
    Parts are timed one by one, so that each finds the caches as it left them; in the whole it costs more. The node of
    the graph is shown alone and around the kernel, over which it adds the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deep_ep_py as ep
from deep_ep_py import ops, validate
from deep_ep_py.communicator import thread_world
from deep_ep_py.engine import num_cores
from deep_ep_py.plans import Plan
from deep_ep_py.registry import buffer_of

Call = Callable[[], Any]
GRAD = "grad"


class Cases:
    """The calls to time. ``groups``: (title, plain call, others); ``parts``: of a cached dispatch. Names that end in
    ``GRAD`` run with gradients on."""

    def __init__(self, num_tokens: int, hidden: int, num_experts: int, num_topk: int, expand: bool) -> None:
        buffer = ep.ElasticBuffer(
            thread_world(1)[0], num_max_tokens_per_rank=num_tokens, hidden=hidden, num_topk=num_topk
        )
        torch.manual_seed(0)
        x, w = torch.randn(num_tokens, hidden), torch.rand(num_tokens, num_topk)
        topk_idx = torch.randint(num_experts, (num_tokens, num_topk))
        rows, _, weights, plain, _ = buffer.dispatch(x, topk_idx, w, num_experts=num_experts, do_expand=expand)
        handle = ep.plan(topk_idx, buffer, num_experts, expand=expand)
        y = rows.clone()
        xg, wg, yg = (t.clone().requires_grad_() for t in (x, w, y))
        gx, gw = rows.clone(), weights.clone()
        number, n, packed = buffer.number, handle.num_rows, handle.packed
        registered = torch.ops.deep_ep_py

        def backward() -> Any:
            return torch.autograd.grad(ep.dispatch(xg, wg, handle), (xg, wg), (gx, gw))

        def plain_backward() -> None:
            buffer.dispatch(x, topk_weights=w, handle=plain, do_expand=expand)
            buffer.combine(gx, plain, topk_weights=gw)

        def cached(*tensors: torch.Tensor) -> Call:
            return lambda: registered.dispatch.default(*tensors, packed, number, n, expand, False)

        def back(rows: torch.Tensor) -> Call:
            return lambda: registered.combine.default(
                rows, None, packed, None, None, number, num_tokens, 0, expand, False
            )

        def uncached(*tensors: torch.Tensor) -> Call:
            return lambda: registered.plan_dispatch.default(
                *tensors, topk_idx, number, num_experts, 1, None, expand, True, False, "contiguous"
            )

        self.groups: list[tuple[str, Call, dict[str, Call]]] = [
            (
                "buffer.dispatch, cached",
                lambda: buffer.dispatch(x, topk_weights=w, handle=plain, do_expand=expand),
                {
                    "dispatch, no grad": lambda: ep.dispatch(x, w, handle),
                    "dispatch, grad": lambda: ep.dispatch(xg, wg, handle),
                    "dispatcher, no grad": cached(x, w),
                    "dispatcher, grad": cached(xg, wg),
                },
            ),
            (
                "buffer.combine",
                lambda: buffer.combine(y, plain),
                {
                    "combine, no grad": lambda: ep.combine(y, handle),
                    "combine, grad": lambda: ep.combine(yg, handle),
                    "dispatcher, no grad": back(y),
                    "dispatcher, grad": back(yg),
                },
            ),
            (
                "buffer.dispatch, new routing",
                lambda: buffer.dispatch(x, topk_idx, w, num_experts=num_experts, do_expand=expand),
                {
                    "plan alone": lambda: ep.plan(topk_idx, buffer, num_experts, expand=expand),
                    "plan_and_dispatch, no grad": lambda: ep.plan_and_dispatch(
                        x, topk_idx, w, buffer, num_experts, expand=expand
                    ),
                    "plan_and_dispatch, grad": lambda: ep.plan_and_dispatch(
                        xg, topk_idx, wg, buffer, num_experts, expand=expand
                    ),
                    "dispatcher, no grad": uncached(x, w),
                    "dispatcher, grad": uncached(xg, wg),
                },
            ),
            ("buffer.dispatch + buffer.combine", plain_backward, {"dispatch and backward, grad": backward}),
        ]

        plan, requests, engine = Plan.of(packed), buffer._requests, buffer._engine
        numbers = number, n, expand, False
        empty = _node(lambda *arguments: (gx.detach(), gw.detach()))
        around = _node(ops.dispatch._kernel)

        def spec() -> Any:
            rows, _ = validate.tokens(x, engine.device)
            spec = requests.dispatch_along(
                requests.check_plan(plan), rows, w, (torch.float32, torch.float64), fixed=True
            )
            spec.mask_weights, spec.zero_padding = not expand, expand
            return spec

        def refusing() -> None:
            with engine.refusing("dispatch"):
                pass

        ready = spec()
        self.parts: dict[str, Call] = {
            "both ways: the engine (core, output tensors)": lambda: engine.dispatch(
                ready, background=False, previous=()
            ),
            "plain: check arguments, build the request": lambda: requests.cached_dispatch(
                x, None, w, plain, {}, 0, expand
            ),
            "op: check arguments, build the request": spec,
            "op: read the packed plan": lambda: Plan.of(packed),
            "op: buffer by number": lambda: buffer_of(number),
            "both ways: context that tells peers": refusing,
            "op: whole kernel, without the call around it": lambda: ops.dispatch._kernel(x, w, packed, *numbers),
            "op: node of the graph around nothing, grad": lambda: empty(xg, wg, packed, numbers),
            "op: node of the graph around the whole kernel, grad": lambda: around(xg, wg, packed, numbers),
        }

    def calls(self) -> dict[str, Call]:
        """All by a name of their own."""
        found = dict(self.parts)
        for title, plain, others in self.groups:
            found[title] = plain
            found |= {f"{title}: {name}": call for name, call in others.items()}
        return found


def _node(kernel: Callable[..., Any]) -> Any:
    """An autograd function as the ops have: ``apply(x, weights, plan, all other arguments)``."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.packed = arguments[2]
        return tuple(kernel(*arguments[:3], *arguments[3]))

    parts = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *gradients: (*gradients, None, None)),
    }
    return type("Node", (torch.autograd.Function,), parts).apply


def timed(call: Call, iterations: int) -> tuple[float, float]:
    """Microseconds a call: by the wall's clock, and by this thread's."""
    wall, own = time.perf_counter(), time.thread_time()
    for _ in range(iterations):
        call()
    wall, own = time.perf_counter() - wall, time.thread_time() - own
    return 1e6 * wall / iterations, 1e6 * own / iterations


def measure(cases: Cases, rounds: int, iterations: int) -> dict[str, Any]:
    """A JSON-able record: for each call, wall and thread time, and what it adds to the plain call of its group."""
    calls = cases.calls()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            with torch.set_grad_enabled(name.endswith(GRAD) and not name.endswith(f"no {GRAD}")):
                found = timed(call, iterations)
            if i:  # the first round warms
                samples[name].append(found)

    def figures(name: str, plain: str | None = None) -> dict[str, float]:
        got = {"wall_us": [s[0] for s in samples[name]], "thread_us": [s[1] for s in samples[name]]}
        if plain is not None:
            pairs = list(zip(samples[name], samples[plain], strict=True))
            got |= {
                "added_wall_us": [a[0] - b[0] for a, b in pairs],
                "added_thread_us": [a[1] - b[1] for a, b in pairs],
            }
        return {key: statistics.median(values) for key, values in got.items()}

    return {
        "groups": {
            title: {"plain": figures(title), **{name: figures(f"{title}: {name}", title) for name in others}}
            for title, _, others in cases.groups
        },
        "parts": {name: figures(name) for name in cases.parts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=200, help="calls in a round")
    parser.add_argument("--quick", "--smoke", action="store_true", help="few calls, a second")
    parser.add_argument("--json", metavar="FILE", help="write the record")
    parser.add_argument("--markdown", metavar="FILE.json", help="print the table of a record and do nothing else")
    options = parser.parse_args()
    from harness import machine, op_path_report

    if options.markdown:
        print(op_path_report.markdown(json.loads(Path(options.markdown).read_text(encoding="utf-8"))))
        return
    if options.quick:
        options.rounds, options.iterations = 3, 20

    torch.set_num_threads(1)
    shape = options.tokens, options.hidden, options.experts, options.topk
    record: dict[str, Any] = {
        "format": 1,
        "machine": machine.facts(num_cores()),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "markdown")},
        "layouts": {},
    }
    for layout, expand in (("compact", False), ("expanded", True)):
        record["layouts"][layout] = measure(Cases(*shape, expand), options.rounds, options.iterations)
    print(op_path_report.text(record))
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
