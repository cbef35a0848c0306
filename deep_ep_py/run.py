"""``python -m deep_ep_py run``: a Python file or module as the main program, with ``deep_ep`` being this library."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from . import compat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as-deep-ep", action="store_true", help="`import deep_ep` gives deep_ep_py, in spawned processes too"
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module, as in `python -m`")
    parser.add_argument("program", help="a Python file, or with -m the name of a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own arguments")
    parser.set_defaults(refuse=parser.error)


def run(options: Any) -> int:
    """Run ``options.program`` as ``__main__``. Its ``SystemExit`` and other exceptions pass through, unchanged."""
    own_folder = not getattr(sys.flags, "safe_path", False)  # else Python puts no folder of the program's in front
    if own_folder:
        sys.path[0] = str(Path.cwd() if options.is_module else Path(options.program).resolve().parent)
    if options.as_deep_ep:
        compat.install()
        # After the program's folder and before everything installed; spawned processes inherit the path, not the hook.
        sys.path.insert(int(own_folder), compat.import_path())
    main = ModuleType("__main__")
    try:
        code, main.__spec__ = _code_of_module(options.program) if options.is_module else _code_of_file(options.program)
    except (OSError, ImportError) as e:
        options.refuse(f"cannot run {options.program!r}: {e}")
    main.__file__ = code.co_filename
    main.__package__ = main.__spec__.parent if main.__spec__ else None
    main.__loader__ = main.__spec__.loader if main.__spec__ else None
    sys.argv = [code.co_filename if options.is_module else options.program, *options.arguments]
    # It stays, unlike with runpy: the program's globals live until the interpreter ends, as they would without us.
    sys.modules["__main__"] = main
    exec(code, main.__dict__)  # noqa: S102  (the user's own program)
    return 0


def _code_of_file(program: str) -> tuple[CodeType, None]:
    path = os.path.abspath(program)  # noqa: PTH100  (Python keeps links in __file__)
    with io.open_code(path) as file:
        return compile(file.read(), path, "exec", dont_inherit=True), None


def _code_of_module(program: str) -> tuple[CodeType, ModuleSpec]:
    spec = importlib.util.find_spec(program)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{program}.__main__")
    get_code = getattr(spec.loader, "get_code", None) if spec else None
    code = get_code(spec.name) if spec and get_code else None
    if spec is None or code is None:
        raise ImportError(f"no module {program} that can be run", name=program)
    return code, spec
