"""Every test that takes ``backend`` runs on every backend of the table. Tests import the installed package, whatever
the working directory is. Slow files start first. With ``--may-skip`` only tests with the named marks may skip."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def leave_out_the_tree():
    """``python -m pytest`` puts the working directory first on the path, where ``deep_ep_py/`` has no extension module
    unless it was built in place. The tree is tested where it was installed in editable mode or PYTHONPATH names it."""
    named = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    if ROOT not in named:
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


leave_out_the_tree()
try:
    from deep_ep_py.testing import BACKENDS
except ImportError as e:
    raise pytest.UsageError(
        f"the tests import the installed package, and that failed: {e}. Install it (pip install '.[test]'), or build "
        f"it in place (python setup.py build_ext --inplace) and set PYTHONPATH={ROOT}"
    ) from e

#: Files that run longest, in the order in which they start: what starts last would run alone at the end.
SLOW_FIRST = (
    "test_cuda_emulated.py",
    "test_sanitizers.py",
    "test_protocol_model.py",
    "test_autograd_compile.py",
    "test_doctor.py",
    "test_examples.py",
    "test_compat.py",
    "test_bench_moe_layer.py",
    "test_bench_nodes.py",
    "test_nodes.py",
    "test_train_example.py",
    "test_collective_processes.py",
    "test_conformance_v2.py",
)

# A rank that fails must not make its peers wait for the default of minutes. Children inherit it.
os.environ.setdefault("DEEP_EP_PY_TIMEOUT_SECONDS", "30")

# Worlds of processes are forked from a server that has torch loaded. It is started by the first of them.
multiprocessing.set_start_method("forkserver", force=True)


def pytest_addoption(parser):
    parser.addoption(
        "--may-skip",
        metavar="MARK,...",
        help="a test that is skipped and has none of these marks fails ('' for none; without this option all may skip)",
    )


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would start the files with the most tests first


def pytest_report_header():
    return f"deep_ep_py: {sys.modules['deep_ep_py'].__file__}"


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    may_skip = item.config.getoption("may_skip")
    if report.skipped and may_skip is not None and not hasattr(report, "wasxfail"):
        marks = {mark.name for mark in item.iter_markers()}
        if marks.isdisjoint(may_skip.split(",")):
            report.outcome = "failed"
            report.longrepr = f"skipped, but --may-skip={may_skip} names none of its marks: {report.longrepr[2]}"
    return report


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread_per_rank():
    """Ranks are threads or processes already; torch's own threads would only crowd them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _outside_the_tree(tmp_path_factory):
    """An interpreter started with ``-c`` or ``-m`` looks into the working directory first, and would import the tree's
    ``deep_ep_py/`` instead of the installed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("working_directory"))
        yield
