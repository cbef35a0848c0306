"""The conformance cases through the emulated library. A program, so that the library can be built with
AddressSanitizer, which wants to be there before the interpreter: see tests/test_cuda_emulated.py.

    PYTHONPATH=.:tests DEEP_EP_SIMT_LIBRARY=<build>/libdeep_ep_simt.so python -m simt.conformance --schedule 1:3:0.1
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
from itertools import product

import torch
from simt import emulated

from deep_ep_py import ElasticBuffer, cast_rows
from deep_ep_py.backends._dtypes import ROW_TYPES
from deep_ep_py.nn import MoELayer
from deep_ep_py.testing import Case, run_processes, run_threads
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import conformance_v2 as v2
from deep_ep_py.testing.cases import order_sensitive
from deep_ep_py.testing.compare import assert_same_bits
from deep_ep_py.testing.conformance_v2 import MODES

#: Small: a thread of the device is a fiber. Together they reach every layout, dtype, alignment and path of the kernels.
CASES = (
    Case((13,), num_experts=16),
    Case((17, 5), hidden=1, num_topk=1, num_experts=7),
    Case((33, 20), hidden=720, num_experts=7, expert_alignment=4),
    Case((31, 32, 33, 1), num_topk=40, num_experts=64, expert_alignment=3),
    Case((12, 12, 12, 12), num_topk=2, num_experts=2),
    Case((0, 7)),
    Case((0, 0), expert_alignment=8),
    Case((20, 10, 15), routing="one_expert", expert_alignment=32),
    Case((6, 5), routing="none"),
    Case((25, 26), num_topk=16, num_experts=7, routing="duplicates", expert_alignment=8),
    Case((14, 15, 16), hidden=33, dtype=torch.float32, routing="distinct"),
    Case((20, 21), hidden=512, dtype=torch.float8_e4m3fn, sf="i32", num_scales=3, gaps="elements"),
    Case((20, 21), hidden=512, dtype=torch.float8_e4m3fn, sf="f32", num_scales=3, gaps="rows"),
    Case((14, 15), hidden=33, dtype=torch.float16, routing="distinct"),
    Case((14, 15), hidden=66, dtype=torch.float64, routing="distinct"),
    Case((20, 21), hidden=65, dtype=torch.float8_e5m2),
    Case((5, 6, 7, 8, 9, 1, 2, 3), hidden=24, num_experts=24, num_topk=3),
)


ONE_AT_A_TIME = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--schedule",
        dest="schedules",
        action="append",
        metavar="POLICY:SEED:DELAYS",
        help="of the scheduler (tests/simt/schedule.hpp), its seed, and the probability that a launch is late (4:1:0)."
        " May be given several times",
    )
    parser.add_argument("--every", type=int, default=1, help="run each so manieth case and mode, beginning with seed")
    parser.add_argument("--match", default="", help="run only what has this in its id")
    parser.add_argument("--processes", action="store_true", help="ranks are processes")
    args = parser.parse_args()
    emulated.install()
    torch.set_num_threads(1)
    world = run_processes if args.processes else run_threads
    multiprocessing.set_start_method("forkserver")  # ranks find torch loaded
    passed = 0
    for schedule in args.schedules or ["4:1:0"]:
        policy, seed, delays = schedule.split(":")
        emulated.functions().deep_ep_simt_configure(int(seed), int(policy))
        emulated.functions().deep_ep_simt_delays(float(delays))
        for case, mode in runs_of(int(seed), args.every, args.match):
            print(schedule, name(case, mode), flush=True)
            world(case.num_ranks, check, case, mode)
            passed += 1
        if not args.match:
            print(schedule, "a layer and its gradients", flush=True)
            run_threads(2, check_layer)
    if not args.match:
        print("fp8", flush=True)
        check_cast()
    print(f"passed: {passed}")


def runs_of(seed, every, match):
    """(case, mode) of each run."""
    runs = [(case, mode) for case in CASES for mode in (None, *MODES) if mode is None or v2.fits(case, mode)]
    return [run for run in runs[seed % every :: every] if match in name(*run)]


def name(case, mode):
    return f"{case.id}-{'v1' if mode is None else mode.id}"


def check(group, case, mode):
    emulated.install()
    if mode is None:
        v1.check_round_trip(group, case, "cuda_peer")
    else:
        v2.check_round_trip(group, case, mode, "cuda_peer", num_biases=(2, 0))


def check_layer(group):
    """An MoE layer forth and back: the same bits as over `collective`."""
    found = []
    for backend in ("cuda_peer", "collective"):
        buffer = ElasticBuffer(group, num_max_tokens_per_rank=24, backend=backend)
        with ONE_AT_A_TIME:  # torch's generator is the process's
            torch.manual_seed(1)
            layer = MoELayer(16, 8, 6, 3, buffer)
        seeded = torch.Generator().manual_seed(group.rank)
        x = torch.randn(20 + group.rank, 16, generator=seeded).requires_grad_()
        y, aux_loss, _ = layer(x)
        (y.square().sum() + aux_loss).backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
        buffer.destroy()
    for i, (actual, expected) in enumerate(zip(*found, strict=True)):
        assert_same_bits(actual, expected, f"result {i}")


def check_cast():
    """fp8 rows and scales: the bits of the CPU's."""
    core = emulated.library.opened(emulated.path())
    for dtype, hidden, channels, round_scale in product(ROW_TYPES, (1, 130, 512), (None, 128, 32), (False, True)):
        if dtype == torch.float64:
            continue
        x = order_sensitive((9, 2 * hidden), dtype, torch.Generator().manual_seed(hidden))[:, :hidden]
        x[:2] *= 1e-6  # below the smallest maximum
        rows, scales = cast_rows(x, channels=channels, round_scale=round_scale)
        got, got_scales = torch.empty_like(rows), torch.empty_like(scales)
        core.cast(
            stream=0, device=0, x=x.data_ptr(), x_stride_bytes=x.stride(0) * x.element_size(), num_rows=9,
            hidden=hidden, channels=channels or hidden, dtype=ROW_TYPES[dtype], round_scale=round_scale,
            out=got.data_ptr(), scales=got_scales.data_ptr(),
        )  # fmt: skip
        assert_same_bits(got_scales, scales, f"scales of {dtype}")
        assert_same_bits(got, rows, f"rows of {dtype}")


if __name__ == "__main__":
    main()
