"""Every test of an operator runs on every backend of this machine.

A test module or class names its operator, ``OPERATOR = "selective_scan"``, and its tests take the fixture ``device``
(with the backend forced) or ``backend_name``.
"""

import pytest
import torch

from visionmamba.ops import backend, explain


def _places(operator: str) -> list:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        pytest.param((device, name), id=f"{device}-{name}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in devices
        for name, objection in explain(operator, device).items()
        if objection is None
    ]


def pytest_generate_tests(metafunc):
    if "_place" in metafunc.fixturenames:
        operator = getattr(metafunc.cls, "OPERATOR", None) or metafunc.module.OPERATOR
        metafunc.parametrize("_place", _places(operator), indirect=True)


@pytest.fixture
def _place(request):
    with backend(request.param[1]):
        yield request.param


@pytest.fixture
def backend_name(_place) -> str:
    """The backend that operators are forced to."""
    return _place[1]


@pytest.fixture
def device(_place) -> str:
    """The device that the test's tensors live on, with a backend that runs there forced."""
    return _place[0]
