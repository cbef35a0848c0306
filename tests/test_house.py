"""The rules of the house: layers, sizes, silence, and the stub of the extension module."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import deep_ep_py

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(deep_ep_py.__file__).parent  # as installed: CI's tree has none of its own
NATIVE = ROOT / "csrc"
NATIVE_SUFFIXES = {".h", ".hpp", ".cpp", ".cu", ".cuh"}

# A module may import what stands on its own line or above, never what stands below.
LAYERS = (
    ("_C",),
    ("errors", "settings", "plans", "types", "profiling", "traced", "event", "notices", "utils"),
    (
        "reference",
        "_reference_rows",
        "layout",
        "communicator",
        "_board",
        "_groups",
        "_rows",
        "_pairs",
        "_mpi",
        "_mpi_duplicate",
        "_nccl",
        "launch",
        "traffic",
    ),
    ("backends",),
    ("choice", "engine", "handle", "config", "validate", "sizes", "fp8"),
    ("requests", "registry", "tickets", "operators", "ops"),
    ("face", "buffer", "elastic", "autograd"),
    ("nn",),
    ("compat", "_as_deep_ep", "run", "doctor", "scale_model", "scale_report", "__main__", "testing"),
    ("__init__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ORACLE = {"reference", "_reference_rows"}
MOVERS = {f"backends.{name}" for name in ("shm", "shm_domain", "collective", "cuda_peer")}
TWO_HOPS = {
    f"backends.{name}"
    for name in ("hybrid", "_staged", "_hops", "_hop_dispatch", "_hop_combine", "_pipeline", "_domains")
}
FACES = {"face", "buffer", "elastic", "autograd"}
MAY_PRINT = {"doctor", "scale_report", "__main__", "testing"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below the package, such as ``backends.shm``; a package is its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


def native_files() -> list[Path]:
    return sorted(path for path in NATIVE.rglob("*") if path.suffix in NATIVE_SUFFIXES)


def top(module: str) -> str:
    return module.partition(".")[0]


def own_imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, imported module below the package) of each import of our own, at module level and inside functions."""
    names = known.keys() | {"_C"}
    package = ["deep_ep_py", *name.split(".")] if path.name == "__init__.py" else ["deep_ep_py", *name.split(".")[:-1]]
    if name == "__init__":
        package = ["deep_ep_py"]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` imports the module of that name where there is one, else the package itself.
            targets = [f"{origin}.{alias.name}" for alias in node.names]
            targets = [t if t.removeprefix("deep_ep_py.") in names else origin for t in targets]
        else:
            continue
        for target in targets:
            if target == "deep_ep_py":
                yield node.lineno, "__init__"
            elif target.startswith("deep_ep_py."):
                yield node.lineno, target.removeprefix("deep_ep_py.")


def test_every_module_stands_in_a_layer() -> None:
    known = modules()
    assert "__init__" in known
    unlisted = sorted({top(name) for name in known} - LEVEL.keys())
    assert not unlisted, f"add {unlisted} to LAYERS in {Path(__file__).name}, on the layer where they belong"


def test_imports_go_down_only() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        for line, target in own_imports(name, path, known):
            where = f"{path.relative_to(PACKAGE.parent)}:{line} imports {target}"
            if top(target) not in LEVEL:
                wrong.append(f"{where}, which stands in no layer")
            elif LEVEL[top(target)] > LEVEL.get(top(name), len(LAYERS)):
                wrong.append(f"{where}, a layer above its own")
            elif name in ORACLE and target not in ORACLE:
                wrong.append(f"{where}: the oracle imports nothing of ours")
            elif top(name) in FACES and top(target) in {"backends", "_C"}:
                wrong.append(f"{where}: the faces know no backend")
            elif name in TWO_HOPS and target in MOVERS:
                wrong.append(f"{where}: hybrid composes two backends and imports neither")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle() -> None:
    known = modules()
    graph = {
        name: {target for _, target in own_imports(name, path, known) if target != name} for name, path in known.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the cycle


def test_native_code_knows_no_torch_and_is_silent() -> None:
    forbidden = {
        "a torch header": re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2)/", re.MULTILINE),
        "output": re.compile(r"\b(std::(cout|cerr|clog)|(?<!n)f?printf\s*\(|puts\s*\(|perror\s*\()"),
        "a write to the environment": re.compile(r"\b(setenv|putenv|unsetenv)\s*\("),
    }
    wrong = [
        f"{path.relative_to(ROOT)}: {what}: {match.group(0).strip()}"
        for path in native_files()
        for what, pattern in forbidden.items()
        for match in pattern.finditer(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def is_environ(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def loud_nodes(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id == "print" and top(name) not in MAY_PRINT:
                yield node.lineno, "prints"
            if isinstance(function, ast.Attribute):
                writes = {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__"}
                if (is_environ(function.value) and function.attr in writes) or function.attr in {"putenv", "unsetenv"}:
                    yield node.lineno, "writes to the environment"
        else:
            item = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and is_environ(node.value)
            if item or (isinstance(node, ast.AugAssign) and is_environ(node.target)):
                yield node.lineno, "writes to the environment"


def test_library_is_silent() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} {what}"
        for name, path in modules().items()
        for line, what in loud_nodes(name, ast.parse(path.read_text(), str(path)))
    ]
    assert not wrong, "\n".join(wrong)


IMPORT_PROBE = """
import importlib, json, logging, os, pkgutil, signal, sys, threading
import torch, torch.distributed  # what torch does at import is its own affair

def state():
    return {
        "environment": dict(os.environ),
        "threads": sorted(os.listdir("/proc/self/task")),
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                              if os.path.islink(f"/proc/self/fd/{fd}")),
        "/dev/shm": sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else [],
        "log handlers": [str(handler) for handler in logging.getLogger().handlers],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "default dtype and device": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "process group": torch.distributed.is_initialized(),
        "CUDA": torch.cuda.is_initialized(),
        "MPI": "mpi4py.MPI" in sys.modules,
        "deep_ep alias": "deep_ep" in sys.modules,
    }

# Reading a file opens descriptors for a moment; only what stays open counts.
before = state()
import deep_ep_py
for module in pkgutil.walk_packages(deep_ep_py.__path__, "deep_ep_py."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_import_does_no_work() -> None:
    # Other processes come and go in /dev/shm; a difference there is believed only if it shows twice.
    for attempt in range(2):
        run = subprocess.run(
            [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, timeout=100, check=False
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""
        if run.stdout == "{}\n":
            return
        assert run.stdout.startswith('{"/dev/shm"') and attempt == 0, f"importing every module changed {run.stdout}"


# --- the stub of the extension module ---------------------------------------------------------------------------------

Signature = tuple[str, ...]
Members = dict[str, "Signature | dict[str, Signature | None] | None"]  # function, class, anything else


def stub_signature(node: ast.FunctionDef, method: bool) -> Signature:
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    static = any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)
    if method and not static:
        names = names[1:]
    if arguments.vararg:
        names.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in arguments.kwonlyargs]
    return (*names, *(["**" + arguments.kwarg.arg] if arguments.kwarg else []))


def stub_members(body: list[ast.stmt], method: bool = False) -> Members:
    found: Members = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(item) for item in node.decorator_list]
            plain = any("property" in item or item.endswith(".setter") for item in decorators)
            found[node.name] = None if plain else stub_signature(node, method)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = stub_members(node.body, method=True)  # type: ignore[assignment]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.Assign):
            found.update({target.id: None for target in node.targets if isinstance(target, ast.Name)})
    return found


def split_arguments(text: str) -> list[str]:
    """The arguments of a signature that starts at the opening parenthesis, whatever brackets and quotes they hold."""
    depth, quote, current, found = 0, "", "", []
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
            if depth == 1:
                continue
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                break
        elif character == "," and depth == 1:
            found.append(current.strip())
            current = ""
            continue
        current += character
    return [*found, current.strip()] if current.strip() else found


def real_signature(function: object, name: str, method: bool) -> Signature:
    text = getattr(function, "__text_signature__", None)  # methods of the C API: ($self, *, ...)
    if text is not None:
        names = split_arguments(text)
        return tuple(names[1:] if method else names)
    documentation = (getattr(function, "__doc__", None) or "").lstrip()
    assert documentation.startswith(f"{name}("), f"{name}: its docstring does not begin with a signature"
    arguments = split_arguments(documentation[len(name) :])
    names = [re.split(r"[:=]", argument)[0].strip() for argument in arguments if argument != "/"]
    return tuple(names[1:] if method and names[:1] == ["self"] else names)


def real_members(owner: ModuleType | type, listed: Members) -> Members:
    if hasattr(owner, "__members__"):  # an enumeration: its other attributes are the same for all
        return dict.fromkeys(owner.__members__)
    found: Members = {}
    for name, value in vars(owner).items():
        if name.startswith("_") and name not in listed:
            continue
        if isinstance(value, type):
            inner = listed.get(name)
            found[name] = real_members(value, inner if isinstance(inner, dict) else {})  # type: ignore[assignment,arg-type]
        else:
            function = getattr(owner, name) if isinstance(value, staticmethod) else value
            found[name] = real_signature(function, name, isinstance(owner, type)) if callable(function) else None
    return found


def differences(stub: Members, real: Members, where: str) -> Iterator[str]:
    for name in sorted(stub.keys() | real.keys()):
        if name not in real:
            # Python derives these for every class, so a stub may name them where the module does not.
            if not (name.startswith("__") and name.endswith("__")):
                yield f"{where}.{name} is in the stub only"
        elif name not in stub:
            if not name.startswith("_"):
                yield f"{where}.{name} is missing in the stub"
        elif isinstance(stub[name], dict) and isinstance(real[name], dict):
            yield from differences(stub[name], real[name], f"{where}.{name}")  # type: ignore[arg-type]
        elif isinstance(stub[name], tuple) and isinstance(real[name], tuple):
            pairs = list(zip(stub[name], real[name], strict=False))  # type: ignore[arg-type]
            same = all(ours == theirs or re.fullmatch(r"arg\d+", theirs) for ours, theirs in pairs)
            if not same or len(stub[name]) != len(real[name]):  # type: ignore[arg-type]
                yield f"{where}.{name}: the stub has {stub[name]}, the module {real[name]}"
        elif type(stub[name]) is not type(real[name]):
            yield f"{where}.{name}: the stub has {stub[name]!r}, the module {real[name]!r}"


def test_stub_agrees_with_the_extension_module() -> None:
    native = importlib.import_module("deep_ep_py._C")
    stub = stub_members(ast.parse((PACKAGE / "_C.pyi").read_text()).body)
    wrong = list(differences(stub, real_members(native, stub), "_C"))
    assert not wrong, "\n".join(wrong)


# --- the project's files ----------------------------------------------------------------------------------------------


def test_version_is_the_metadata_s() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert deep_ep_py.__version__ == declared.group(1) == importlib.metadata.version("deep_ep_py")
    assert f"## [{declared.group(1)}]" in (ROOT / "CHANGELOG.md").read_text()


def test_slow_files_that_start_first_are_there() -> None:
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    listed = ast.parse((ROOT / "tests" / "conftest.py").read_text())
    slow = next(
        ast.literal_eval(node.value)
        for node in listed.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SLOW_FIRST"
    )
    assert slow and set(slow) <= names


def test_linters_are_pinned_alike() -> None:
    pins = [
        set(re.findall(r'"((?:ruff|clang-format)==[\w.]+)"', (ROOT / name).read_text()))
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    ]
    assert len(pins[0]) == 2 and pins[0] == pins[1]


def test_readme_has_the_command_that_ci_runs() -> None:
    found = re.findall(
        r"<!-- test-command -->\s+```\w*\n(.+?)```\s+<!-- /test-command -->",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert len(found) == 1 and "pytest" in found[0]


def test_interpreters_that_tests_start_import_the_same_package() -> None:
    """And not ``deep_ep_py/`` of the working directory. Where it differs, PYTHONPATH has a relative entry."""
    command = [sys.executable, "-c", "import deep_ep_py, sys; sys.stdout.write(deep_ep_py.__file__)"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (run.stdout, run.stderr) == (deep_ep_py.__file__, "")
