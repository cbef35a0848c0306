"""What a training run shows of itself: a progress bar, where its time goes, curves as a picture, a comparison."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

KINDS = [f"{phase} {kind}" for phase in ("forward", "backward") for kind in ("dispatch", "combine", "wait")]
AFTER_FLIP = 0.05
FAULT_SHOWS = 5


def progress(steps: range, describe: Callable[[], str]) -> Iterator[int]:
    """These steps, with a bar on stderr: tqdm's where it is installed, else a line."""
    try:
        from tqdm import tqdm
    except ImportError:
        began, shown = time.monotonic(), 0.0
        for step in steps:
            yield step
            now = time.monotonic()
            if now - shown > (0.2 if sys.stderr.isatty() else 10) or step == steps.stop - 1:
                shown, bar = now, "#" * (20 * (step + 1) // steps.stop)
                speed = (step + 1 - steps.start) / (now - began)
                line = f"[{bar:20}] {step + 1}/{steps.stop} {speed:.2f} steps/s {describe()}"
                print(f"\r{line}", end="\n" if step == steps.stop - 1 else "", file=sys.stderr, flush=True)
    else:
        with tqdm(total=steps.stop, initial=steps.start, unit="step") as bar:
            for step in steps:
                yield step
                bar.set_postfix_str(describe(), refresh=False)
                bar.update()


def exchange_seconds(profile: torch.profiler.profile, on_gpu: bool) -> list[float]:
    """Seconds inside the library's operators, waiting for other ranks included, one number for each of KINDS.

    Of the spans that torch's profiler sees anyway: an operator is ``deep_ep_py::dispatch`` in compiled code, else the
    autograd function ``dispatch``, and ``combineBackward`` is a dispatch (of the gradient). "wait" is what computation
    did not hide of a dispatch that ran behind it.
    """
    events = profile.events()
    backward = [e.time_range for e in events if e.name == "train: backward"]
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        name = event.name.removeprefix("deep_ep_py::")
        base = name.removesuffix("Backward")
        if base not in ("plan", "dispatch", "plan_dispatch", "combine", "finish"):
            continue
        turned = name != base
        kind = "wait" if base == "finish" else "combine" if (base == "combine") != turned else "dispatch"
        inside = any(span.start <= event.time_range.start < span.end for span in backward)
        microseconds = event.device_time_total if on_gpu else event.cpu_time_total
        found[f"{'backward' if inside else 'forward'} {kind}"] += microseconds / 1e6
    return list(found.values())


def plot(path: Path, record: dict[str, Any]) -> None:
    """The loss, and for each MoE layer every expert's load over the mean, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load = torch.tensor(record["load"], dtype=torch.float64)  # [steps, L, E]
    load = load / load.mean(2, keepdim=True).clamp_min(1e-9)
    figure, axes = pyplot.subplots(1, 1 + load.shape[1], figsize=(4.2 * (1 + load.shape[1]), 3.4), layout="constrained")
    axes[0].plot(record["loss"])
    axes[0].set(title="loss (nats per byte)", xlabel="step")
    for layer, axis in enumerate(axes[1:]):
        axis.plot(load[:, layer], linewidth=0.8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"load of the experts, MoE layer {layer} (mean = 1)", xlabel="step", ylim=(0, None))
    figure.savefig(path, dpi=110)


def compare(record: dict[str, Any], other: dict[str, Any], first: int, tolerance: float) -> tuple[bool, str]:
    """Whether two runs of the same settings have the same losses from step ``first`` on, and a line about it.

    They agree within ``tolerance`` until rounding sends a token with two equally good experts to the other one, which
    the loads show, and within AFTER_FLIP from there. In the first FAULT_SHOWS steps no such excuse is taken: a fault
    shows there, rounding hardly ever.
    """
    differing = [key for key, value in record["settings"].items() if other["settings"].get(key) != value]
    if differing:
        return False, f"not comparable: the runs differ in {', '.join(differing)}"
    end = min(len(record["loss"]), len(other["loss"]))
    if first >= end:
        return False, "not comparable: no step in common"
    apart = [abs(a - b) for a, b in zip(record["loss"][:end], other["loss"][:end], strict=True)]
    flip = next((step for step in range(first, end) if record["load"][step] != other["load"][step]), end)
    flip = max(flip, min(first + FAULT_SHOWS, end))
    before, after = apart[first:flip], apart[flip:]
    same = all(a <= tolerance for a in before) and all(a <= AFTER_FLIP for a in after)  # no NaN is
    line = f"losses of steps {first} to {flip - 1} differ by at most {max(before):.1e} (tolerance {tolerance:.1e})"
    if after:
        line += f"; in step {flip} a choice of experts flips: then by {max(after):.1e} (tolerance {AFTER_FLIP:.1e})"
    return same, f"{'equal' if same else 'DIFFERENT'}: {line}"
