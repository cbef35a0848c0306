"""The tables of a JSON record, as plain text and as Markdown. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_COLUMNS = (
    "operation", "median ms", "p95 ms", "SU GB/s", "floor ms", "% of floor (min–max)", "% of copy floor",
    "gloo ms", "gloo / ours", "tuned gloo / ours", "MPI ms", "MPI / ours",
)  # fmt: skip


def text(record: dict[str, Any]) -> str:
    """Plain text for a terminal."""
    return "\n".join(_lines(record, _plain_table, bold=""))


def markdown(record: dict[str, Any]) -> str:
    """The same tables in Markdown."""
    return "\n".join(_lines(record, _markdown_table, bold="**"))


def figures(record: dict[str, Any]) -> str:
    """A few rows and columns for a first look, in Markdown: V2's compact rows beside gloo and MPI."""
    machine, run, first = record["machine"], record["run"], record["shapes"][0]
    rows = [
        [
            f"T={shape['num_tokens']}: {row['operation']}",
            f"{_ms(row['median_ms'])} ms",
            *(_beside(row.get(peer)) for peer in ("gloo", "mpi")),
            f"{row['percent_of_copy_floor']['median']:.0f} %",
        ]
        for shape in record["shapes"]
        for row in shape["rows"]
        if row["mode"] == "V2 compact bf16" and (shape is first or row["operation"] != "combine, y copied")
    ]
    where = (
        f"{run['ranks']} ranks on {machine['cores']} cores of one {machine['cpu']}, {machine['date'][:10]}; hidden "
        f"{first['hidden']}, {first['num_experts']} experts, top-{first['num_topk']}, bf16; T tokens a rank."
    )
    columns = ("operation", "deep_ep_py", "gloo with permutes", "MPI `Alltoallv`, bytes only", "of the copy floor")
    return "\n".join([where, "", *_markdown_table(columns, rows)])


def _beside(peer: dict[str, Any] | None) -> str:
    return f"{_ms(peer['median_ms'])} ms ({peer['ratio']['median']:.1f}×)" if peer else "–"


def _lines(record: dict[str, Any], table: Any, bold: str) -> Iterator[str]:
    machine, run = record["machine"], record["run"]
    yield (
        f"{machine['date']} · {machine['cpu']}, {machine['cores']} cores ({machine['caches']}), "
        f"{machine['memory_gib']} GiB · {machine['machine']} · {machine['kernel']}"
    )
    yield (
        f"deep_ep_py {machine['deep_ep_py']}, backend {run['backend']} ({machine['simd']}) · torch {machine['torch']}, "
        f"Python {machine['python']} · {run['ranks']} ranks, {run['threads']} threads a rank · MPI: {run['mpi']}"
    )
    for name, reason in run["refused"].items():
        yield f"backend {name} was refused: {reason}"
    for shape in record["shapes"]:
        yield ""
        yield f"{bold}{_title(shape)}, {shape['rounds']} rounds{bold}"
        yield ""
        yield _ceilings(shape["ceilings"])
        yield ""
        yield from table(_COLUMNS, [_cells(row, run["mpi_missing"]) for row in shape["rows"]])
    yield from _extras(record, table, bold)


def _title(shape: dict[str, Any]) -> str:
    return (
        f"T={shape['num_tokens']} tokens a rank, hidden {shape['hidden']}, {shape['num_experts']} experts, "
        f"top-{shape['num_topk']} (N={shape['received_tokens_per_rank']:.0f} rows received a rank, expanded "
        f"D={shape['expanded_rows_per_rank']:.0f})"
    )


def _ceilings(ceilings: dict[str, Any]) -> str:
    rates = ceilings["gb_per_s"]
    where = "memory, non-temporal stores" if ceilings["memory"] else "caches, ordinary stores"
    read, write, copy = (rates[kind]["median"] for kind in ("read", "write", "copy"))
    copies_at = 100 * copy * (1 / read + 1 / write)
    spread = ", ".join(f"{k} {r['median']:.1f} ({r['min']:.1f}–{r['max']:.1f})" for k, r in rates.items())
    size = ceilings["bytes_per_rank"] / 2**20
    return (
        f"Ceilings, GB/s of all ranks together ({where}; {size:.1f} MiB a rank): {spread}. "
        f"The copy is at {copies_at:.0f} % of its own floor"
    )


def _cells(row: dict[str, Any], mpi_missing: str) -> list[str]:
    percent = row["percent_of_floor"]
    cells = [
        f"{row['mode']}: {row['operation']}",
        _ms(row["median_ms"]),
        _ms(row["p95_ms"]),
        f"{row['su_gb_per_s']:.2f}",
        _ms(row["floor_ms"]),
        f"{percent['median']:.0f} ({percent['min']:.0f}–{percent['max']:.0f})",
        f"{row['percent_of_copy_floor']['median']:.0f}",
    ]
    for name in ("gloo", "tuned_gloo", "mpi"):
        shown = [_ms(row[name]["median_ms"]), _ratio(row[name]["ratio"])] if name in row else ["–", "–"]
        if name == "mpi" and mpi_missing:
            shown[0] = mpi_missing
        cells += shown[1:] if name == "tuned_gloo" else shown
    return cells


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['min']:.1f}–{spread['max']:.1f})"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _extras(record: dict[str, Any], table: Any, bold: str) -> Iterator[str]:
    latency, first, hidden = (record.get(key) for key in ("latency", "first", "overlap"))
    if latency:
        yield from ("", f"{bold}One token a rank, V2 dispatch + combine (median of {latency['iterations']}){bold}", "")
        rows = [["whole pair, slowest rank", latency["whole_us"]], ["  its p95", latency["whole_p95_us"]]]
        names = {
            "rank0_whole_us": "whole pair, rank 0",
            "face_us": "  of it: Python above the backend",
            "backend_us": "  of it: backend, specs prebuilt",
            "core_us": "    of that: core + binding, waiting for peers included",
            "tensors_us": "    of that: output tensors (torch.empty, from_dlpack), measured apart",
            "barrier_us": "for comparison: one barrier",
        }
        rows += [[label, latency[key]] for key, label in names.items() if key in latency]
        yield from table(("part", "µs"), [[label, f"{value:.1f}"] for label, value in rows])
    if first:
        yield from ("", f"{bold}First dispatch after construction, T={first['num_tokens']}, sizes told{bold}", "")
        yield (
            f"construction {first['construction_ms']:.0f} ms, first dispatch {_ms(first['first_ms'])} ms, steady "
            f"{_ms(first['steady_ms'])} ms: {first['first_ms'] / first['steady_ms']:.2f}×"
        )
    if hidden:
        yield from ("", f"{bold}Asynchronous dispatch behind computation, one rank{bold}", "")
        if "skipped" in hidden:
            yield f"skipped: {hidden['skipped']}"
        else:
            yield (
                f"T={hidden['num_tokens']}: {100 * hidden['hidden']:.0f} % hidden ({100 * hidden['hidden_min']:.0f}–"
                f"{100 * hidden['hidden_max']:.0f}); dispatch alone {hidden['dispatch_ms']:.1f} ms, computation alone "
                f"{hidden['compute_ms']:.1f} ms, both {hidden['both_ms']:.1f} ms"
            )


def _plain_table(columns: Sequence[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(line[i]) for line in [list(columns), *rows]) for i in range(len(columns))]
    for line in [list(columns), ["-" * w for w in widths], *rows]:
        yield "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])


def _markdown_table(columns: Sequence[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"
    for row in rows:
        yield f"| {' | '.join([row[0].replace('  ', '&emsp;'), *row[1:]])} |"
