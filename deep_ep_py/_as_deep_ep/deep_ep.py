"""``deep_ep`` for interpreters in which nobody called ``deep_ep_py.compat.install()``; see ``compat.import_path``.

The folder of this file is no package: it stands on the import path, and this file is what ``import deep_ep`` finds.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if __name__ == "deep_ep":  # under any other name, as in a walk over all files, it does nothing
    if importlib.util.find_spec("deep_ep_py") is None:  # a checkout that is not installed, started from elsewhere
        sys.path.append(str(Path(__file__).resolve().parents[2]))
    from deep_ep_py import compat

    sys.modules[__name__] = sys.modules["deep_ep_py"]  # what the import under way returns
    compat.install(__name__)
