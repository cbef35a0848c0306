"""Programs written for DeepEP run unchanged: ``import deep_ep`` gives this library.

The alias is a finder at the head of ``sys.meta_path``. It answers for ``deep_ep`` and every module below it with the
*same module objects* that ``deep_ep_py`` has, so there is one set of classes, whichever name they were imported by. A
module is imported when it is asked for, not before.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

from .errors import EPArgumentError, EPError

__all__ = ["import_path", "install", "uninstall"]

_OURS = __name__.partition(".")[0]


def install(name: str = "deep_ep") -> None:
    """Make ``import <name>`` and the imports of its submodules give deep_ep_py's own modules. Idempotent.

    It acts in this process and those forked from it. A process that starts a new interpreter (``spawn``, a
    subprocess) needs its own call, before it imports ``deep_ep``: put it at the top of the module that ranks import, or
    see :func:`import_path`. An installed ``deep_ep`` that nobody imported yet is hidden, not touched.

    ``importlib.metadata.version(name)`` gives deep_ep_py's version, as ``<name>.__version__`` does.

    Args:
        name: a top-level module name.

    Raises:
        EPArgumentError: not a top-level module name, or deep_ep_py's own.
        EPError: another module of this name was imported before; two libraries would be in use at once.
    """
    if not isinstance(name, str) or not name.isidentifier() or name == _OURS:
        raise EPArgumentError.of("name", f"the name of a top-level module other than {_OURS}", repr(name))
    for imported, module in list(sys.modules.items()):
        if _below(imported, name) and module is not sys.modules.get(_real(imported, name)):
            where = getattr(module, "__file__", None) or ("blocked" if module is None else "without a file")
            raise EPError(
                f"{imported} is imported already ({where}) and is not {_OURS}: call {_OURS}.compat.install() before "
                f"anything imports {name}"
            )
    if _Finder(name) not in sys.meta_path:
        sys.meta_path.insert(0, _Finder(name))  # first: a path finder would load the files a second time


def uninstall(name: str = "deep_ep") -> None:
    """Undo :func:`install`: later imports find what they would have found. Modules already imported stay in use.

    Args:
        name: as given to :func:`install`; nothing happens if it was not.
    """
    if _Finder(name) in sys.meta_path:
        sys.meta_path.remove(_Finder(name))
        for imported in [key for key in sys.modules if _below(key, name)]:
            del sys.modules[imported]


def import_path() -> str:
    """A folder in which ``import deep_ep`` finds this library: for interpreters that others start.

    On ``PYTHONPATH`` or ``sys.path`` before an installed ``deep_ep``, it does what :func:`install` does at the first
    import. ``multiprocessing`` hands ``sys.path`` on to the processes it spawns.
    """
    return str(Path(__file__).with_name("_as_deep_ep"))


class _Finder(MetaPathFinder):
    """Answers for one name and everything below it. Finders of one name are equal, those of a reloaded module too."""

    def __init__(self, name: str) -> None:
        self.alias_of_deep_ep_py = name

    def __eq__(self, other: object) -> bool:
        return getattr(other, "alias_of_deep_ep_py", None) == self.alias_of_deep_ep_py

    def __hash__(self) -> int:
        return hash(self.alias_of_deep_ep_py)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _below(fullname, self.alias_of_deep_ep_py):
            return None
        real = importlib.util.find_spec(_real(fullname, self.alias_of_deep_ep_py))
        if real is None:
            return None
        spec = ModuleSpec(fullname, _Loader(real.name), origin=real.origin)
        spec.has_location = real.has_location
        spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The metadata of deep_ep_py for whoever asks for this name; a list of everything installed stays as it is."""
        asked = getattr(context, "name", None)
        if asked is not None and _normalized(asked) == _normalized(self.alias_of_deep_ep_py):
            yield from Distribution.discover(name=_OURS)


class _Loader(Loader):
    """Loads a module by putting another in its place: ``sys.modules`` is what an import returns."""

    def __init__(self, real: str) -> None:
        self._real = real

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self._real)


def _below(fullname: str, name: str) -> bool:
    return fullname == name or fullname.startswith(name + ".")


def _real(fullname: str, name: str) -> str:
    return _OURS + fullname[len(name) :]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
