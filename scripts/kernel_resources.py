"""What each kernel takes of a multiprocessor, as ptxas says it, checked against ``csrc/cuda/resources.json``.

    python scripts/kernel_resources.py build/cmake-*/cuda            # compares; exit status 1 where they differ
    python scripts/kernel_resources.py build/cmake-*/cuda --update   # writes the file anew
    python scripts/kernel_resources.py --show                        # the file as a table

A build with nvcc leaves ``<name>.ptxas`` for every ``csrc/cuda/<name>.cu``, and ``nvcc_version``. Always an error: a
kernel that spills registers, a kernel that the file does not know, one that only the file knows. Where nvcc's version
is the file's, every number must be equal too; other compilers allot registers in other ways.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
REPORT = SOURCES / "resources.json"

Resources = dict[str, int]
Kernels = dict[str, dict[str, Resources]]  # "file.cu: kernel" -> "sm_90" -> number by name

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def parse(text: str) -> Iterator[tuple[str, str, Resources]]:
    """(mangled name, architecture, resources) of each kernel in ptxas's words."""
    entry: tuple[str, str] | None = None
    frame = (0, 0, 0)
    for line in text.splitlines():
        if found := ENTRY.search(line):
            entry, frame = (found[1], found[2]), (0, 0, 0)
        elif found := FRAME.search(line):
            frame = (int(found[1]), int(found[2]), int(found[3]))
        elif entry and (found := USED.search(line)):
            shared = SHARED.search(line)
            stack, stores, loads = frame
            yield (
                *entry,
                {
                    "registers": int(found[1]),
                    "shared_bytes": int(shared[1]) if shared else 0,
                    "stack_bytes": stack,
                    "spill_bytes": stores + loads,
                },
            )
            entry = None


def demangle(names: list[str]) -> list[str]:
    """Kernels' names without namespaces, return type and parameters: ``place_kernel<4, true>``."""
    if not names or shutil.which("c++filt") is None:
        return names
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short(line) for line in said.splitlines()]


def short(name: str) -> str:
    """``void deep_ep::cuda::(anonymous namespace)::f<(int)4>(P)`` -> ``f<4>``"""
    name = name.replace("(anonymous namespace)::", "").replace("deep_ep::cuda::", "").replace("deep_ep::", "")
    name = re.sub(r"\((?:int|bool|unsigned int|long|(?:\w+::)*[A-Z]\w*)\)(?=[\d-])", "", name)
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:at]
            break
    return name.removeprefix("void ")


def read_build(folder: Path, sources: Path = SOURCES) -> tuple[str, Kernels]:
    """(nvcc's version, resources) of a build's folder. Logs of sources that are no more are left aside.

    Raises:
        SystemExit: a source has no log: nothing was built there, or not everything.
    """
    kernels: Kernels = {}
    for source in sorted(sources.glob("*.cu")):
        log = folder / f"{source.stem}.ptxas"
        if not log.exists():
            raise SystemExit(f"{log} is missing: build with nvcc first (DEEP_EP_CUDA=on)")
        entries = list(parse(log.read_text()))
        for name, (_, architecture, resources) in zip(demangle([e[0] for e in entries]), entries, strict=True):
            by_architecture = kernels.setdefault(f"{source.name}: {name}", {})
            if architecture in by_architecture:
                raise SystemExit(f"{source.name}: two kernels are called {name}")
            by_architecture[architecture] = resources
    return (folder / "nvcc_version").read_text().strip(), kernels


def differences(version: str, built: Kernels, report: dict[str, object]) -> Iterator[str]:
    """What is wrong with what was built, or differs from the file."""
    known: Kernels = report["kernels"]  # type: ignore[assignment]
    for name in sorted(built.keys() | known.keys()):
        if name not in known:
            yield f"{name}: a new kernel"
        elif name not in built:
            yield f"{name}: is in the file only"
    for name, by_architecture in sorted(built.items()):
        for architecture, resources in sorted(by_architecture.items()):
            if resources["spill_bytes"]:
                yield f"{name}: spills {resources['spill_bytes']} bytes on {architecture}"
            before = known.get(name, {}).get(architecture)
            if version == report["nvcc"] and name in known and resources != before:
                yield f"{name}: on {architecture} {resources}, in the file {before}"


def write(version: str, kernels: Kernels, path: Path = REPORT) -> None:
    """One line an architecture, sorted, so that a change reads well in a diff."""
    lines = []
    for name, by_architecture in sorted(kernels.items()):
        ordered = sorted(by_architecture.items(), key=lambda item: int(re.sub(r"\D", "", item[0])))
        inner = ",\n".join(f"      {json.dumps(a)}: {json.dumps(r)}" for a, r in ordered)
        lines.append(f"    {json.dumps(name)}: {{\n{inner}\n    }}")
    body = ",\n".join(lines)
    path.write_text(f'{{\n  "nvcc": {json.dumps(version)},\n  "kernels": {{\n{body}\n  }}\n}}\n')


def table(kernels: Kernels) -> Iterator[str]:
    """Kernels with the most that any architecture takes."""
    width = max(map(len, kernels), default=0)
    yield f"{'kernel':{width}}  registers  shared  stack  spills"
    for name, by_architecture in sorted(kernels.items()):
        most = {key: max(r[key] for r in by_architecture.values()) for key in next(iter(by_architecture.values()))}
        yield (
            f"{name:{width}}  {most['registers']:9}  {most['shared_bytes']:6}  {most['stack_bytes']:5}"
            f"  {most['spill_bytes']:6}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("build", nargs="?", type=Path, help="folder of a build that holds *.ptxas")
    parser.add_argument("--update", action="store_true", help="write the file")
    parser.add_argument("--show", action="store_true", help="print the file as a table")
    options = parser.parse_args(argv)
    if not options.build and not options.show:
        parser.error("name a build's folder, or --show")
    wrong: list[str] = []
    if options.build:
        version, built = read_build(options.build)
        if options.update:
            write(version, built)
        wrong = list(differences(version, built, json.loads(REPORT.read_text())))
        for line in wrong:
            print(line)
        if wrong:
            print(f"{REPORT.relative_to(ROOT)}: if this is meant, run scripts/kernel_resources.py with --update")
        else:
            count = sum(map(len, built.values()))
            print(f"{len(built)} kernels, {count} with architectures: no spills; nvcc {version}")
    if options.show:
        print("\n".join(table(json.loads(REPORT.read_text())["kernels"])))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
