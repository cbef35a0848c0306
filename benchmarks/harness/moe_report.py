"""The record of bench_moe_layer.py as tables and as a chart. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .report import _markdown_table, _plain_table

_NAMES = {
    "ours": "deep_ep_py.nn.MoELayer",
    "ours_in_place": "the same, rows left in the heap",
    "all_to_all": "all_to_all_single, a row per slot",
    "tuned_all_to_all": "tuned: a row per rank",
}
_COLUMNS = ("", "step ms (min–max)", "step / ours", "communication ms", "communication / ours", "its share of the step")


def text(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record, _plain_table))


def markdown(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record, _markdown_table))


def _lines(record: dict[str, Any], table: Any) -> Iterator[str]:
    machine, run, shape = record["machine"], record["run"], record["shape"]
    yield (
        f"{machine['date']} · {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB · "
        f"{machine['machine']} · {machine['kernel']} · torch {machine['torch']}, Python {machine['python']}"
    )
    yield (
        f"One MoE layer, forward + backward: T={shape['num_tokens']} tokens a rank, hidden {shape['hidden']}, expert "
        f"width {shape['width']}, {shape['num_experts']} experts, top-{shape['num_topk']}, {shape['dtype']} · "
        f"{run['ranks']} ranks, {run['threads']} threads a rank, {run['rounds']} rounds · backend {run['backend']}"
    )
    for dtype, found in record["differences"].items():
        worst, allowed = max(d for peer in found.values() for d in peer.values()), record["tolerance"][dtype]
        yield f"checked in {dtype}: rows differ by {worst:.2g} of their length at most ({allowed:.2g} allowed)"
    yield ""
    yield from table(_COLUMNS, [_cells(record, name) for name in _NAMES])
    yield ""
    ratios = (f"{r['median']:.1f} ({r['min']:.1f}–{r['max']:.1f})" for r in _in_place(record))
    yield f"Communication over ours where rows are left in the heap: {', tuned '.join(ratios)}"


def _in_place(record: dict[str, Any]) -> list[dict[str, float]]:
    return list(record["communication_ratio_in_place"].values())


def _cells(record: dict[str, Any], name: str) -> list[str]:
    def cell(key: str, digits: int, scale: float = 1) -> str:
        s = record[key].get(name)
        if s is None:
            return "–"
        return f"{scale * s['median']:.{digits}f} ({scale * s['min']:.{digits}f}–{scale * s['max']:.{digits}f})"

    share = cell("communication_share", 1, 100)
    return [
        _NAMES[name],
        cell("step_ms", 0),
        cell("step_ratio", 2),
        cell("communication_ms", 1),
        cell("communication_ratio", 1),
        share if share == "–" else f"{share} %",
    ]


def plot(record: dict[str, Any], path: str) -> None:
    """Writes a PNG: the step and its communication, side by side. matplotlib is imported here only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    shape, machine = record["shape"], record["machine"]
    figure.suptitle(
        f"One MoE layer, forward + backward · T={shape['num_tokens']}, hidden {shape['hidden']}, "
        f"{shape['num_experts']} experts, top-{shape['num_topk']}, {shape['dtype']} · "
        f"{record['run']['ranks']} ranks on {machine['cores']} cores · {machine['date']}",
        fontsize=9,
    )
    for axis, key, title in zip(
        figure.subplots(1, 2), ("step_ms", "communication_ms"), ("whole step", "communication alone"), strict=True
    ):
        spreads = record[key]
        medians = [s["median"] for s in spreads.values()]
        errors = [
            [s["median"] - s["min"] for s in spreads.values()],
            [s["max"] - s["median"] for s in spreads.values()],
        ]
        colours = ["#1f6fb4" if name.startswith("ours") else "#c9a227" for name in spreads]
        axis.barh([_NAMES[name] for name in spreads], medians, xerr=errors, color=colours, ecolor="#444444", capsize=2)
        for place, s in enumerate(spreads.values()):
            axis.annotate(f"{s['median']:.0f}", (s["max"], place), (4, 0), textcoords="offset points", va="center")
        axis.set_xlim(0, 1.2 * max(s["max"] for s in spreads.values()))
        axis.invert_yaxis()
        axis.set_title(f"{title}, ms of the slowest rank", fontsize=9)
    figure.savefig(path, dpi=130)
