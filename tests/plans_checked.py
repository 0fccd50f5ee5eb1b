"""A plugin that plans every call of an operator and compares the plan with the function, to the bit.

On a GPU: ``PYTHONPATH=tests pytest -p plans_checked -m gpu tests/ops tests/models/test_gpu_goldens.py``. Without one,
where an operator's backend is plain PyTorch: ``PYTHONPATH=tests pytest -p plans_checked tests/ops -k cpu-torch``. Tests
that count calls fail: a call is made four times here.
"""

import importlib

import torch
from torch import Tensor

plan, operators = (importlib.import_module(f"visionmamba.ops.{name}") for name in ("_plan", "_operator"))
counts = {"planned": 0, "not planned": 0}


def _elsewhere(value):
    """Return a tensor in other memory, laid out alike; what is no whole tensor stays."""
    if isinstance(value, Tensor) and value._base is None:
        return value.clone(memory_format=torch.preserve_format)
    return value


def _tuple(results):
    return (results,) if isinstance(results, Tensor) else results


def _call(plans, *inputs):
    expected = plans._function(*inputs)
    found, planned = plan._Recorder(plans._functions).record(plans._function, inputs)
    counts["not planned" if planned is None else "planned"] += 1
    if planned is None:
        return found
    for again in (found, planned(*inputs), planned(*map(_elsewhere, inputs))):
        for x, y in zip(_tuple(again), _tuple(expected), strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
            assert torch.equal(x.nan_to_num(), y.nan_to_num())
    return again


def pytest_configure():
    """Plan on every device, and what plain PyTorch does, too."""
    operators._PLANNED, plan._SEEN = ("cpu", "cuda"), ("cuda", "torch")
    plan.Plans.__call__ = _call


def pytest_terminal_summary(terminalreporter):
    """Say how many calls were compared."""
    terminalreporter.write_line(", ".join(f"{count} calls {name}" for name, count in counts.items()))
