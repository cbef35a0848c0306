"""The record of bench_op_path.py as a table. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .report import _markdown_table, _plain_table


def text(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record, _plain_table))


def markdown(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record, _markdown_table))


def _lines(record: dict[str, Any], table: Any) -> Iterator[str]:
    machine, options = record["machine"], record["options"]
    yield (
        f"{machine['date']} · {machine['cpu']}, {machine['cores']} cores · {machine['machine']} · "
        f"torch {machine['torch']}, Python {machine['python']}"
    )
    yield (
        f"T={options['tokens']}, hidden {options['hidden']}, {options['experts']} experts, top-{options['topk']}, "
        "float32, one rank; µs a call, in parentheses µs added to the plain call"
    )
    yield ""
    layouts = record["layouts"]
    columns = ("call", *(f"{layout}, {clock}" for layout in layouts for clock in ("wall", "thread")))
    yield from table(columns, list(_rows(list(layouts.values()))))


def _rows(layouts: list[dict[str, Any]]) -> Iterator[list[str]]:
    for title, calls in layouts[0]["groups"].items():
        for name in calls:
            label = title if name == "plain" else f"  {name}"
            yield [label, *(cell for found in layouts for cell in _cells(found["groups"][title][name]))]
    yield ["parts of a cached dispatch", *[""] * 2 * len(layouts)]
    for name in layouts[0]["parts"]:
        yield [f"  {name}", *(cell for found in layouts for cell in _cells(found["parts"][name]))]


def _cells(row: dict[str, float]) -> Iterator[str]:
    for clock in ("wall", "thread"):
        added = row.get(f"added_{clock}_us")
        yield f"{row[f'{clock}_us']:.1f}" + ("" if added is None else f" ({added:+.1f})")
