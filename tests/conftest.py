"""Every test that takes ``backend`` runs on every backend of the table."""

import multiprocessing
import os

import pytest
import torch

from deep_ep_py.testing import BACKENDS

# A rank that fails must not make its peers wait for the default of minutes. Children inherit it.
os.environ.setdefault("DEEP_EP_PY_TIMEOUT_SECONDS", "30")

# Worlds of processes are forked from a server that has torch loaded. It is started by the first of them.
multiprocessing.set_start_method("forkserver", force=True)


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
