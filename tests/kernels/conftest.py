"""What tests of whole operators over emulated kernels share."""

import importlib
from dataclasses import replace

import pytest

OPERATORS = ("causal_conv1d", "channel_norm", "gelu_linear", "selective_scan")


@pytest.fixture
def cuda_backends(monkeypatch):
    """Say that the operators' CUDA backends run on the CPU; what launches for them is the test's to set."""
    registry = importlib.import_module("visionmamba.ops.backend")
    for op in OPERATORS:
        table = registry._implementations[op]
        monkeypatch.setitem(table, "cuda", replace(table["cuda"], device_types=("cpu",), probe=lambda: None))
    registry._probe.cache_clear()
    yield
    registry._probe.cache_clear()
