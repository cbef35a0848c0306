"""The JSON record as a chart. matplotlib is imported here only."""

from __future__ import annotations

from typing import Any

from .table import bits_per_second

_COLOURS = {"hierarchical": "#1f6fb4", "flat": "#b4431f", "plain": "#c9a227"}
_OPERATIONS = ("dispatch", "combine")


def plot(record: dict[str, Any], path: str) -> None:
    """Writes a PNG: for each world, size and routing, times by link rate, and what the rows alone take at that rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (world, [c for c in world["cells"] if (c["tokens"], c["routing"]) == key])
        for world in record["worlds"]
        for key in dict.fromkeys((c["tokens"], c["routing"]) for c in world["cells"])
    ]
    figure = Figure(figsize=(12, 3.4 * len(panels) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 2, squeeze=False)
    machine = record["machine"]
    figure.suptitle(
        f"deep_ep_py across hosts of a test network, all on {machine['cores']} cores · {machine['cpu']} · "
        f"{machine['date']}",
        fontsize=11,
    )
    for (world, cells), pair in zip(panels, axes, strict=True):
        for axis, operation in zip(pair, _OPERATIONS, strict=True):
            _draw(axis, world, cells, operation)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), fontsize=9)
    figure.savefig(path, dpi=130)


def _draw(axis: Any, world: dict[str, Any], cells: list[dict[str, Any]], operation: str) -> None:
    from matplotlib.ticker import NullFormatter

    for i, (name, colour) in enumerate(_COLOURS.items()):
        for place, cell in enumerate(cells):
            row = next(r for r in cell["rows"] if (r["contender"], r["operation"]) == (name, operation))
            x = place + 0.27 * (i - 1)
            axis.bar(x, row["median_ms"], width=0.25, color=colour, label=None if place else name)
            axis.plot([x, x], [row["median_ms"], row["p95_ms"]], color="#444444", linewidth=1)
            axis.annotate(
                f"{row['median_ms']:.{0 if row['median_ms'] >= 100 else 1}f}",
                (x, row["p95_ms"]),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
            rate = bits_per_second(cell["rate"])
            if rate:
                floor = 8e3 * max(row["row_bytes_per_host"]) / rate
                label = "rows at the link's rate" if (place, i) == (len(cells) - 1, 0) else None
                axis.plot([x - 0.12, x + 0.12], [floor, floor], color="black", linewidth=1.2, label=label)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 1.5)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(cells)), [f"link: {c['rate']}" for c in cells], fontsize=8)
    axis.set_ylabel("ms, slowest rank (log)", fontsize=8)
    hosts = "+".join(map(str, world["ranks_by_host"]))
    axis.set_title(f"{operation}: {hosts} ranks, T={cells[0]['tokens']}, routing {cells[0]['routing']}", fontsize=9)
