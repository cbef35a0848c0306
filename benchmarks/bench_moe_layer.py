"""One step of an MoE layer, forward and backward, beside the same layer over plain ``all_to_all_single``.

    torchrun --standalone --nproc-per-node 4 benchmarks/bench_moe_layer.py --json out.json --plot out.png
    python benchmarks/bench_moe_layer.py --markdown out.json

Contenders
    deep_ep_py.nn.MoELayer; and twice the same layer, with its very router, expert weights and grouped expert code,
    whose exchange is what a user writes over ``torch.distributed.all_to_all_single`` (gloo) with autograd, see
    harness/moe_exchange.py: one row per token and slot, the usual form; and, tuned, one row per token and rank.
    Included in each: finding destinations in topk_idx, exchange of counts, of rows and of weights, sorting rows by
    expert, the way back, the sum over slots, and all of their gradients. Experts multiply by the weights, in all.

What is checked first
    Output and all gradients of each layer against this library's, in float32 with few tokens and then as it is timed,
    row by row (harness/moe_step.py gives the tolerance and why); the communication part alone bit for bit, with numbers
    whose sums are exact. A wrong result ends the run.

What is measured
    Rounds, at least 5 by default; in each, every contender in turn, another one first each time. All ranks leave one
    barrier; a step's time is the slowest rank's. Ratios are taken inside a round; the table shows their median, and
    the smallest and largest.

    step: the layer's forward and backward; parameters' gradients begin as None, as behind an optimizer.
    communication: what lies between the router's output and the experts' input, and between the experts' output and the
    layer's, forward and backward, with identity experts that cost nothing. Rows and gradients that come from experts
    lie in ordinary memory, so this library copies them into its heap in both passes, and this is counted. In the row
    "left in the heap" it need not: experts that work in place, or write to ``buffer.empty``.
    share: communication alone over the step.

On a CPU without bf16 matrix instructions, products of bf16 take several times longer than those of float32, and a step
is mostly these; ``--dtype float32`` shows the same layer without that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

_DEFAULTS = {"tokens": 2048, "hidden": 1024, "width": 512, "experts": 64, "topk": 6}
_QUICK = {"tokens": 64, "hidden": 64, "width": 32, "experts": 16, "topk": 4}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], epilog="Run it by torchrun.")
    names = {
        "tokens": "T, tokens a rank", "hidden": "hidden size", "width": "inner width of an expert",
        "experts": "experts of all ranks", "topk": "slots of a token",
    }  # fmt: skip
    for name, meaning in names.items():
        parser.add_argument(f"--{name}", type=int, help=f"{meaning} ({_DEFAULTS[name]})")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of rows, experts"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--backend", default="auto", help="backend of this library")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--quick", "--smoke", action="store_true", help="a small shape, seconds")
    parser.add_argument("--json", metavar="FILE", help="write the record")
    parser.add_argument("--plot", metavar="FILE.png", help="write a chart (needs matplotlib)")
    parser.add_argument("--markdown", metavar="FILE.json", help="print the table of a record and do nothing else")
    options = parser.parse_args(argv)
    for name, value in (_QUICK if options.quick else _DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(*(getattr(options, name) for name in names), options.rounds) < 1:
        parser.error("sizes and rounds are positive")
    if options.topk > options.experts:
        parser.error("--topk: at most --experts")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """The record, on rank 0."""
    import torch
    from harness import machine
    from harness.moe_step import LayerShape
    from harness.moe_step import measure as measure_layers
    from harness.world import World

    world = World()
    if options.experts % world.size:
        raise SystemExit(f"--experts: a multiple of the {world.size} ranks, not {options.experts}")
    dtype = getattr(torch, options.dtype)
    shape = LayerShape(options.tokens, options.hidden, options.width, options.experts, options.topk, dtype)
    found = measure_layers(world, shape, options.rounds, options.backend, options.seed)
    record = {"format": 1, "machine": machine.facts(world.cores), **found}
    world.close()
    return record if world.rank == 0 else None


def main() -> None:
    options = arguments()
    from harness import moe_report

    if options.markdown:
        print(moe_report.markdown(json.loads(Path(options.markdown).read_text(encoding="utf-8"))))
        return
    if "RANK" not in os.environ:
        raise SystemExit(f"run it by torchrun: torchrun --standalone --nproc-per-node 4 {sys.argv[0]}")
    record = measure(options)
    if record is None:
        return
    print(moe_report.text(record))
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot:
        moe_report.plot(record, options.plot)


if __name__ == "__main__":
    main()
