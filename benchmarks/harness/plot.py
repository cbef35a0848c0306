"""The JSON record as a chart. matplotlib is imported here only."""

from __future__ import annotations

from typing import Any

_COLOURS = {"ours": "#1f6fb4", "gloo": "#c9a227", "mpi": "#8a8a8a"}


def plot(record: dict[str, Any], path: str) -> None:
    """Writes a PNG: for each shape, time over the floor, and times beside gloo's and MPI's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = record["shapes"]
    if not shapes:
        raise SystemExit("--plot: no shape was timed, so there is nothing to draw")
    heights = [max(2.4, 0.42 * len(shape["rows"]) + 1.2) for shape in shapes]
    figure = Figure(figsize=(13, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shapes), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    machine, run = record["machine"], record["run"]
    figure.suptitle(
        f"deep_ep_py ({run['backend']}), {run['ranks']} ranks on {machine['cores']} cores · {machine['cpu']} · "
        f"{machine['date']}",
        fontsize=11,
    )
    for shape, (left, right) in zip(shapes, axes, strict=True):
        _over_floor(left, shape)
        _beside_peers(right, shape)
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=9)
    figure.savefig(path, dpi=130)


def _labels(axis: Any, shape: dict[str, Any]) -> list[int]:
    rows = shape["rows"]
    places = list(range(len(rows)))
    axis.set_yticks(places, [f"{row['mode']}\n{row['operation']}" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    return places


def _over_floor(axis: Any, shape: dict[str, Any]) -> None:
    places = _labels(axis, shape)
    spreads = [row["time_over_floor"] for row in shape["rows"]]
    medians = [s["median"] for s in spreads]
    errors = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
    axis.barh(places, medians, xerr=errors, color=_COLOURS["ours"], height=0.62, ecolor="#444444", capsize=2)
    for place, spread in zip(places, spreads, strict=True):
        _annotate(axis, f"{spread['median']:.2f}", spread["max"], place)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axis.set_xlim(0, 1.15 * max([1.2, *(s["max"] for s in spreads)]))
    title = f"T={shape['num_tokens']}, hidden {shape['hidden']}: time over the machine's floor (1 = the floor)"
    axis.set_title(title, fontsize=9)


def _annotate(axis: Any, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _beside_peers(axis: Any, shape: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    places = _labels(axis, shape)
    rows = shape["rows"]
    series = {
        "ours": [row["median_ms"] for row in rows],
        "gloo": [row["gloo"]["median_ms"] if "gloo" in row else None for row in rows],
        "mpi": [row["mpi"]["median_ms"] if "mpi" in row else None for row in rows],
    }
    names = {"ours": "deep_ep_py", "gloo": "gloo all_to_all + permutes", "mpi": "MPI Alltoallv, bytes only"}
    for offset, (name, values) in zip((-0.27, 0.0, 0.27), series.items(), strict=True):
        shown = [(place + offset, value) for place, value in zip(places, values, strict=True) if value is not None]
        if not shown:
            continue
        axis.barh([p for p, _ in shown], [v for _, v in shown], height=0.25, color=_COLOURS[name], label=names[name])
        for place, value in shown:
            _annotate(axis, f"{value:.3g}", value, place)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * 1.6)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"T={shape['num_tokens']}: median time of the slowest rank, ms (log)", fontsize=9)
