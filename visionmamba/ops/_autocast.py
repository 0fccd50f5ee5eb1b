"""Autocast for operators whose activations share one dtype while their parameters stay in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["autocast_activations"]

_DEVICE_TYPES = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}


def autocast_activations(name: str, positions: Sequence[int]) -> None:
    """Under autocast, bring activations of mixed dtypes to the autocast dtype before ``visionmamba::<name>`` runs.

    Matrix products come in the autocast dtype, norms and elementwise results often in float32. Activations that are
    all float32 stay so, and the other arguments are never touched: the states are in float32 anyway.

    Args:
        name: The operator, already registered.
        positions: Where its activations stand among its arguments.
    """
    operator = getattr(torch.ops.visionmamba, name).default
    for device_type, key in _DEVICE_TYPES.items():
        kernel = _kernel(operator, tuple(positions), device_type, getattr(torch._C.DispatchKey, f"Autocast{key}"))
        torch.library.impl(f"visionmamba::{name}", f"Autocast{key}")(kernel)


def _kernel(operator, positions, device_type, key):
    autocast_keys = torch._C.DispatchKeySet(key)

    def kernel(*arguments):
        dtype = torch.get_autocast_dtype(device_type)
        dtypes = {arguments[i].dtype for i in positions if arguments[i] is not None}
        if dtypes == {torch.float32, dtype}:
            arguments = [x.to(dtype) if i in positions and x is not None else x for i, x in enumerate(arguments)]
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return operator(*arguments)

    return kernel
