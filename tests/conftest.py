"""What all tests share: what is skipped where, one thread for each parallel worker, and numbers drawn alike."""

import os
import random
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch and numba start their threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

_TIMM_MARKERS = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward"


def pytest_configure(config):
    for marker in _TIMM_MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: of timm's own suite")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Let a test draw the same numbers whichever tests ran before it: also in fixtures of a module or a session."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiler_without_memory():
    """Let torch.compile forget other tests' models: all share one ``forward``, which it compiles only a few times."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
