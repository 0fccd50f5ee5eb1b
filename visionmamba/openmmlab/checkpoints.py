"""Reading the Runner's checkpoints on PyTorch 2.6 and later.

``torch.load`` then admits nothing but tensors and what it is told to be harmless. A Runner's checkpoint holds its log,
which is no tensor: mmengine up to 0.10.7 cannot resume from it. What is named here holds numbers and nothing else; any
other code is still not run.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer

__all__ = ["allow_runner_checkpoints"]

_STATISTICS = ("current", "max", "mean", "min")
_DTYPES = ("bool", "float32", "float64", "int32", "int64")


def _statistic(owner: type, name: str) -> Callable:
    """Stand for ``getattr``, by which a log names its own methods, and do nothing else."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(f"a checkpoint asks for attribute {name!r} of {owner!r}")
    return getattr(HistoryBuffer, name)


def allow_runner_checkpoints() -> None:
    """Tell ``torch.load`` that the log of a Runner's checkpoint is harmless."""
    array, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    moved = [
        (function, f"{package}.multiarray.{name}")  # numpy 2 has moved them, and checkpoints name either place
        for function, name in ((array, "_reconstruct"), (scalar, "scalar"))
        for package in ("numpy.core", "numpy._core")
    ]
    dtypes = [type(np.dtype(name)) for name in _DTYPES]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *moved, (_statistic, "builtins.getattr")]
    )
