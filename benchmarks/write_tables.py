"""Writes the tables of benchmark records into README.md and docs/benchmarks.md, between the marks that name a record.

    python benchmarks/write_tables.py

    <!-- tables: benchmarks/results/RECORD.json -->
    all rows and columns, as the benchmark prints them with --markdown
    <!-- /tables -->

    <!-- figures: benchmarks/results/RECORD.json -->
    a few rows and columns, of a record of bench_dispatch_combine.py or bench_nodes.py
    <!-- /figures -->

To show another record, change the name in the mark and run this program again. Needs Python only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import moe_report, op_path_report, report
from nodes import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKS = re.compile(r"(<!-- (tables|figures): (\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)

#: By the key that only the records of one benchmark have.
WRITERS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "tables": {
        "shapes": report.markdown,
        "worlds": table.markdown,
        "step_ms": moe_report.markdown,
        "layouts": op_path_report.markdown,
    },
    "figures": {"shapes": report.figures, "worlds": table.figures},
}


def filled(text: str) -> str:
    """The page with the text between its marks renewed."""

    def renewed(mark: re.Match[str]) -> str:
        begin, kind, name, end = mark.groups()
        record = json.loads((ROOT / name).read_text(encoding="utf-8"))
        found = [write(record) for key, write in WRITERS[kind].items() if key in record]
        if len(found) != 1:
            raise SystemExit(f"{name}: {kind} can be written of a record with one of {list(WRITERS[kind])}")
        return f"{begin}\n{found[0]}\n\n{end}"

    return MARKS.sub(renewed, text)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
