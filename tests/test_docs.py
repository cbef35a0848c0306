"""What the pages say holds: their programs run, their links and paths lead somewhere, their tables are the records'."""

from __future__ import annotations

import os
import re
import socket
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch.distributed as dist

from deep_ep_py import Settings
from deep_ep_py.testing import run_processes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "csrc/**/*.md") for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: Pages whose Python blocks, one after the other, are a program that needs neither MPI nor a GPU.
PROGRAMS = ("README.md", "docs/coming-from-deepep.md", "docs/observability.md", "docs/training.md")


def program(page: str) -> str:
    blocks = [body for language, body in FENCED.findall((ROOT / page).read_text()) if language == "python"]
    assert blocks, f"{page} has no Python"
    return "\n".join(blocks)


def as_torchrun_starts_it(group, page: str) -> None:
    port = [0]
    if group.rank() == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = [server.getsockname()[1]]
    dist.broadcast_object_list(port, src=0)
    rank, size = str(group.rank()), str(group.size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(names, MASTER_PORT=str(port[0]), TORCHELASTIC_RUN_ID="docs")
    dist.barrier()
    dist.destroy_process_group()
    exec(compile(program(page), page, "exec"), {"__name__": "__main__"})


@pytest.mark.processes
@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run_on_two_ranks(page):
    run_processes(2, as_torchrun_starts_it, page)


def test_the_readme_runs_as_threads(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    exec(compile(program("README.md"), "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.count("combined: [128, 1024]") == 2
    rows = [int(n) for listed in re.findall(r"here: \[([\d, ]+)\]", printed) for n in listed.split(",")]
    assert len(rows) == 64 and sum(rows) == 2 * 128 * 8


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    dead, found = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^()\s]+)\)", FENCED.sub("", page.read_text())):
            if target.startswith(("https://", "http://")):
                continue
            found += 1
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert found > 20 and not dead, dead


def test_paths_exist():
    """Those that pages name in code: of folders that are in every copy of the tree."""
    named = {
        (page, path)
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for path in re.findall(
            r"(?<![\w/.-])(?:tests|benchmarks|examples|scripts|csrc|docs|cmake)/[\w./-]*\w", page.read_text()
        )
        if "NAME" not in path
    }
    missing = [f"{page.relative_to(ROOT)}: {path}" for page, path in named if not (ROOT / path).exists()]
    assert len(named) > 20 and not missing, missing


def test_settings_exist():
    known = {f"DEEP_EP_PY_{field.name.upper()}" for field in fields(Settings)}
    named = {name for page in PAGES for name in re.findall(r"\bDEEP_EP_PY_[A-Z_]*[A-Z]\b", page.read_text())}
    assert named and named <= known, named - known


@pytest.fixture
def write_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import write_tables

    yield write_tables
    for name in set(sys.modules) - before:  # "harness" and "nodes" are names of a folder of scripts
        if name.partition(".")[0] in {"write_tables", "harness", "nodes"}:
            del sys.modules[name]


def test_tables_are_those_of_the_records(write_tables):
    for page in write_tables.PAGES:
        text = page.read_text()
        assert write_tables.MARKS.search(text), page
        assert write_tables.filled(text) == text, f"{page}: run `python benchmarks/write_tables.py`"
