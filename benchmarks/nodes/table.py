"""From the raw record of a cell to rows of the table, and the table. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

COLUMNS = (
    "operation", "median ms", "p95 ms", "SU GB/s", "SO GB/s", "sent MB/host", "rows MB/host", "% of link, rows",
    "% of link, frames", "cores busy %", "/ hierarchical (min–max)",
)  # fmt: skip
_BASE = "hierarchical"


def bits_per_second(rate: str) -> float:
    """Of a rate as ``tc`` writes it; 0 for ``none``."""
    if rate == "none":
        return 0.0
    for unit, factor in {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}.items():
        if rate.endswith(unit):
            return float(rate[: -len(unit)]) * factor
    raise ValueError(f"a rate as tc writes it, in kbit, mbit or gbit, or none; not {rate!r}")


def rows_of(cell: dict[str, Any], shape: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each contender and operation, and for both operations together."""
    medians = {
        name: {op: [statistics.median(calls) for calls in rounds] for op, rounds in operations.items()}
        for name, operations in cell["seconds"].items()
    }
    for found in medians.values():
        found["pair"] = [sum(pair) for pair in zip(found["dispatch"], found["combine"], strict=True)]
    return [
        _row(cell, shape, name, operation, medians) for operation in ("dispatch", "combine", "pair") for name in medians
    ]


def _row(
    cell: dict[str, Any], shape: dict[str, int], name: str, operation: str, medians: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    base, own = medians[_BASE][operation], medians[name][operation]
    row: dict[str, Any] = {
        "contender": name,
        "operation": operation,
        "median_ms": 1e3 * statistics.median(own),
        "ratio": _spread([theirs / ours for theirs, ours in zip(own, base, strict=True)]),
    }
    if operation == "pair":
        return row
    calls = sorted(s for rounds in cell["seconds"][name][operation] for s in rounds)
    seconds = statistics.median(calls)
    per_slot = 12 if operation == "dispatch" else 4  # topk_idx and topk_weights; weights
    counted = shape["hidden"] * 2 + per_slot * shape["num_topk"]
    wire, crossing = cell["wire"][name][operation], cell["wire_rows"][name]
    leaving = crossing if operation == "dispatch" else zip(*crossing, strict=True)
    rows = [sum(row) for row in leaving]
    payload = [n * shape["hidden"] * 2 for n in rows]
    rate = bits_per_second(cell["rate"])
    return row | {
        "median_ms": 1e3 * seconds,
        "p95_ms": 1e3 * calls[min(len(calls) - 1, round(0.95 * (len(calls) - 1)))],
        "calls": len(calls),
        "su_gb_per_s": cell["received_per_rank"] * counted / seconds / 1e9,
        "so_gb_per_s": cell["sent_per_rank"] * counted / seconds / 1e9,
        "sent_bytes_per_host": wire["interface"],
        "row_bytes_per_host": payload,
        "ledger_bytes_per_host": cell["ledger"][name][operation] if name in cell["ledger"] else None,
        "percent_of_link_rows": 100 * max(payload) * 8 / seconds / rate if rate else None,
        "percent_of_link_frames": 100 * max(wire["limited"]) * 8 / seconds / rate if rate else None,
        "cores_busy_percent": 100 * cell["busy"][name],
    }


def text(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record, _plain_table))


def markdown(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record, _markdown_table))


def figures(record: dict[str, Any]) -> str:
    """One row for each cell, in Markdown, and the rows that cross."""
    return "\n".join(_figures(record))


def _figures(record: dict[str, Any]) -> Iterator[str]:
    yield _where(record)
    columns = (
        "link, T, routing", "dispatch / combine ms", "flat / two hops", "plain / two hops",
        "% of link, rows (frames): dispatch, combine",
    )  # fmt: skip
    for world in record["worlds"]:
        shape = world["shape"]
        title = f"{_hosts(world)} ranks, hidden {shape['hidden']}, top-{shape['num_topk']} of {shape['num_experts']}"
        yield from ("", title, "")
        yield from _markdown_table(columns, [_short(cell) for cell in world["cells"]])
        yield from ("", "Rows that cross to other hosts, per token", "")
        yield from _markdown_table(*_crossings(world))


def _short(cell: dict[str, Any]) -> list[str]:
    rows = {(row["contender"], row["operation"]): row for row in cell["rows"]}
    own = [rows[_BASE, operation] for operation in ("dispatch", "combine")]
    links = [
        f"{row['percent_of_link_rows']:.0f} ({row['percent_of_link_frames']:.0f})"
        for row in own
        if row["percent_of_link_rows"] is not None
    ]
    return [
        f"{cell['rate']}, {cell['tokens']}, {cell['routing']}",
        " / ".join(_ms(row["median_ms"]) for row in own),
        *(_ratio(rows[name, "pair"]["ratio"]) for name in ("flat", "plain")),
        ", ".join(links) or "–",
    ]


def _where(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{machine['date']} · {machine['cpu']}, {machine['cores']} cores for all ranks of all hosts, "
        f"{machine['memory_gib']} GiB · {machine['kernel']} · torch {machine['torch']}"
    )


def _hosts(world: dict[str, Any]) -> str:
    return "+".join(map(str, world["ranks_by_host"]))


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})"


def _lines(record: dict[str, Any], table: Any) -> Iterator[str]:
    yield _where(record)
    for world in record["worlds"]:
        for cell in world["cells"]:
            yield from ("", _title(world, cell), "")
            yield from table(COLUMNS, [_cells(row) for row in cell["rows"]])
        yield from ("", "Rows that cross to other hosts, per token", "")
        yield from table(*_crossings(world))


def _title(world: dict[str, Any], cell: dict[str, Any]) -> str:
    shape, rounds = world["shape"], len(cell["seconds"][_BASE]["dispatch"])
    return (
        f"{_hosts(world)} ranks, link {cell['rate']}, T={cell['tokens']}, hidden "
        f"{shape['hidden']}, top-{shape['num_topk']} of {shape['num_experts']}, routing {cell['routing']}: {rounds} "
        f"rounds of {cell['iterations']}, load average before {cell['load_average']:.1f}"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    last = "" if row["contender"] == _BASE else _ratio(row["ratio"])
    cells = [f"{row['operation']}: {row['contender']}", _ms(row["median_ms"])]
    if row["operation"] == "pair":
        return [*cells, *[""] * (len(COLUMNS) - 3), last]
    links = [row["percent_of_link_rows"], row["percent_of_link_frames"]]
    return [
        *cells,
        _ms(row["p95_ms"]),
        f"{row['su_gb_per_s']:.3f}",
        f"{row['so_gb_per_s']:.3f}",
        f"{max(row['sent_bytes_per_host']) / 1e6:.2f}",
        f"{max(row['row_bytes_per_host']) / 1e6:.2f}",
        *("–" if percent is None else f"{percent:.0f}" for percent in links),
        f"{row['cores_busy_percent']:.0f}",
        last,
    ]


def _crossings(world: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """What one hop and two put on the wire for each routing, and what was counted there."""
    columns = ("routing", "T", "flat", "hierarchical", "expected", "MB rows", "MB ledger", "MB sent", "over ledger %")
    lines, seen = [], set()
    size = sum(world["ranks_by_host"])
    for cell in world["cells"]:
        key = cell["routing"], cell["tokens"]
        if key in seen:
            continue
        seen.add(key)
        flat = sum(map(sum, cell["wire_rows"]["flat"])) / (size * cell["tokens"])
        row = next(r for r in cell["rows"] if (r["contender"], r["operation"]) == (_BASE, "dispatch"))
        kinds = ("row_bytes_per_host", "ledger_bytes_per_host", "sent_bytes_per_host")
        by_rows, told, counted = (max(row[kind]) for kind in kinds)
        crossing, expected = cell["crossings_per_token"], cell["expected_crossings_per_token"]
        pairs = [f"{flat:.3f}", f"{crossing:.3f}", f"{expected:.3f}"]
        megabytes = [f"{n / 1e6:.3f}" for n in (by_rows, told, counted)]
        lines.append([key[0], str(key[1]), *pairs, *megabytes, f"{100 * (counted / told - 1):.2f}"])
    return columns, lines


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _plain_table(columns: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(line[i]) for line in [list(columns), *rows]) for i in range(len(columns))]
    for line in [list(columns), ["-" * w for w in widths], *rows]:
        yield "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
