"""Floors, tables and the summary of gpu_check.py's record. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

TARGET_PERCENT = 80.0


def moved_bytes(operation: str, tokens: int, rows: int, row_bytes: int) -> int:
    """Bytes that an operation reads and writes, over all ranks: ``tokens`` rows at their sources, ``rows`` received.

    dispatch reads each token once and writes each received row; combine reads every row and writes every token.
    """
    if operation not in {"dispatch", "combine"}:
        raise ValueError(f"operation: dispatch or combine, not {operation}")
    return (tokens + rows) * row_bytes


def floor_seconds(moved: int, copy_bytes_per_second: float) -> float:
    """At the rate of a large device copy, of which every byte counts twice: read and written."""
    return moved / copy_bytes_per_second


def fewest_sms(seconds: dict[int, float], share: float = 0.9) -> int:
    """The fewest SMs of a sweep whose speed is at least ``share`` of the best one's.

    Raises:
        ValueError: the sweep is empty.
    """
    best = min(seconds.values())
    return min(sms for sms, took in seconds.items() if took * share <= best)


def summary(record: dict[str, Any]) -> tuple[int, str]:
    """(exit status, one line): 0 if nothing failed and something passed."""
    by_status: dict[str, list[str]] = {}
    for name, stage in record["stages"].items():
        by_status.setdefault(stage["status"], []).append(name)
    line = "; ".join(f"{status}: {', '.join(names)}" for status, names in sorted(by_status.items()))
    return (1 if "failed" in by_status or "passed" not in by_status else 0), line


def text(record: dict[str, Any]) -> str:
    """The record as a page for a terminal."""
    return "\n".join(lines(record))


def lines(record: dict[str, Any]) -> Iterator[str]:
    device = record["device"]
    yield ""
    if device:
        yield (
            f"{device['name']} × {device['count']}, sm_{device['architecture']}, {device['sms']} SMs, "
            f"{device['memory_gib']:.0f} GiB · driver {device['driver']} · CUDA {device['cuda']}"
            f" · torch {device['torch']} · NCCL {device['nccl']} · {record['date']}"
        )
        yield ""
    rows = [
        [
            name,
            stage["status"],
            f"{stage['seconds']:.0f}",
            (stage.get("reason", "").strip().splitlines() or [""])[-1][:120],
        ]
        for name, stage in record["stages"].items()
    ]
    yield from table(("stage", "result", "s", "why"), rows)
    yield from _timings(record["stages"].get("timings", {}).get("data", {}))
    yield from _nccl(record["stages"].get("nccl", {}).get("data", {}))
    yield ""
    yield f"{summary(record)[1]} ({record['seconds']:.0f} s)"


def _timings(data: dict[str, Any]) -> Iterator[str]:
    if "copy_gb_per_s" in data:
        yield ""
        yield f"device copy: {data['copy_gb_per_s']:.0f} GB/s read and written ({data['copy_mib']} MiB)"
    if shape := data.get("shape"):
        yield ""
        yield (
            f"{shape['ranks']} ranks as threads, T={shape['tokens']} each, hidden {shape['hidden']}, "
            f"top-{shape['topk']} of {shape['experts']}, bf16"
        )
        yield ""
        cells = [
            [o["name"], o["how"], f"{o['ms']:.3f}", f"{o['floor_ms']:.3f}", f"{o['percent']:.0f}",
             "" if o["percent"] >= TARGET_PERCENT else f"below {TARGET_PERCENT:.0f}"]
            for o in data.get("operations", [])
        ]  # fmt: skip
        yield from table(("operation", "how", "ms", "floor ms", "% of floor", ""), cells)
    if pairs := data.get("pairs"):
        yield ""
        cells = [[f"R={p['ranks']}", str(p["tokens"]), p["how"], f"{p['us']:.0f}"] for p in pairs]
        yield from table(("dispatch + combine", "T", "how", "µs"), cells)
    for operation, sweep in data.get("sweeps", {}).items():
        by_sms = {int(sms): ms for sms, ms in sweep.items()}
        yield ""
        shown = ", ".join(f"{sms}: {ms:.2f}" for sms, ms in sorted(by_sms.items()))
        yield f"{operation}, ms by SMs a rank: {shown}; {fewest_sms(by_sms)} reach 90 % of the best"


def _nccl(data: dict[str, Any]) -> Iterator[str]:
    if "ms" in data:
        yield ""
        yield (
            f"NCCL all_to_all_single, {data['ranks']} ranks on {data['devices']} GPU(s), "
            f"{data['bytes'] / 2**20:.0f} MiB in all: {data['ms']:.3f} ms (no permutes, no counts, no sum)"
        )


def table(columns: Sequence[str], rows: list[list[str]]) -> Iterator[str]:
    """Plain text: the first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [list(columns), *rows]) for i in range(len(columns))]
    right = [all(row[i].replace(".", "").isdigit() or not row[i] for row in rows) for i in range(len(columns))]
    for line in [list(columns), ["-" * w for w in widths], *rows]:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        yield "  ".join(cells).rstrip()
