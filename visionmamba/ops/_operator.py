"""Operators of PyTorch's dispatcher, registered with little Python between a call and its function.

``torch.library.custom_op`` does the same and more: with autograd it spends tens of microseconds of every call reading
the schema, which counts where a small model waits for Python. Schemas, fake kernels, aliases and the registration of
gradients are checked by ``torch.library.opcheck`` in the tests instead of in every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._plan import Plans

__all__ = [
    "differentiable",
    "fake_gradients",
    "gradients_as_results",
    "operator",
    "planned_operators",
    "present_gradients",
    "register_fake",
]

_LIBRARY = torch.library.Library("visionmamba", "FRAGMENT")
_BELOW = torch._C._after_autograd_keyset
_DEVICES = (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.CPU)
_PLANNED = () if os.environ.get("VISIONMAMBA_PLANS") == "0" else ("cuda",)  # elsewhere kernels are launched unseen
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in (torch._C.DispatchKey.AutocastCUDA, torch._C.DispatchKey.AutocastMPS, torch._C.DispatchKey.AutocastXPU):
    _AUTOCAST = _AUTOCAST.add(_key)


@dataclass
class _Formula:
    """How an operator is differentiated; without one its results refuse to be."""

    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None


_formulas: dict[str, _Formula] = {}
_planned: list[str] = []
_functions: dict[Any, Callable[..., Any]] = {}


def operator(name: str, schema: str, planned: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as ``visionmamba::<name>`` on every device.

    ``torch.compile`` keeps the operator in its graph and does not look into the function. Autocast does not reach into
    it either: an operator's implementations choose their dtypes themselves.

    Args:
        name: The operator's name.
        schema: Its arguments, all positional, and results, which alias nothing.
        planned: Whether all that the function does on a GPU follows from its arguments' signature; see :mod:`._plan`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        overload = getattr(torch.ops.visionmamba, name).default
        _formulas[name], _functions[overload] = _Formula(), function
        kernel = _backend_kernel(function, Plans(function, _functions) if planned else None)
        if planned:
            _planned.append(name)
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, _autograd_kernel(overload, kernel, _formulas[name]), "Autograd", with_keyset=True)
        return function

    return register


def planned_operators() -> list[str]:
    """Return the operators whose calls on NVIDIA GPUs are recorded: none with ``VISIONMAMBA_PLANS=0``."""
    return sorted(_planned) if _PLANNED else []


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as what ``visionmamba::<name>`` returns for tensors without data."""
    return torch.library.register_fake(f"visionmamba::{name}", lib=_LIBRARY)


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give ``visionmamba::<name>`` its gradient.

    Args:
        name: An operator registered by :func:`operator`.
        backward: Takes the context and the results' gradients; returns the inputs' gradients.
        setup_context: Takes the context, all inputs and the results; saves what ``backward`` needs.
    """
    _formulas[name].setup_context, _formulas[name].backward = setup_context, backward


def gradients_as_results(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return what a backward operator returns: the inputs' gradients in their dtypes.

    An operator's results cannot be None: an absent input's is an empty tensor. The first input is there.
    """
    return tuple(
        inputs[0].new_empty(0) if tensor is None else gradient.to(tensor.dtype).contiguous()
        for gradient, tensor in zip(gradients, inputs, strict=True)
    )


def fake_gradients(inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return what :func:`gradients_as_results` does, for tensors without data."""
    absent = inputs[0].new_empty
    return tuple(
        absent(0) if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in inputs
    )


def present_gradients(results: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return a backward operator's results as autograd takes them: None for absent inputs."""
    return [None if tensor is None else result for result, tensor in zip(results, inputs, strict=True)]


def _backend_kernel(function: Callable[..., Any], plans: Plans | None) -> Callable[..., Any]:
    def kernel(*inputs):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return plans(*inputs) if plans is not None and inputs[0].device.type in _PLANNED else function(*inputs)

    return torch._disable_dynamo(kernel)


def _autograd_kernel(
    overload: torch._ops.OpOverload, backend_kernel: Callable[..., Any], formula: _Formula
) -> Callable[..., Any]:
    def below(keyset, inputs):
        keys = keyset & _BELOW
        with torch._C._AutoDispatchBelowAutograd():
            if keys.highestPriorityTypeId() in _DEVICES:  # neither a mode nor a transform is in between
                return backend_kernel(*inputs)
            return overload.redispatch(keys, *inputs)

    def forward(ctx, keyset, *inputs):
        results = below(keyset, inputs)
        if formula.setup_context is not None:
            formula.setup_context(ctx, inputs, results)
        return results

    def backward(ctx, *gradients):
        if formula.backward is None:
            raise RuntimeError(f"{overload._schema.name} has no gradient")
        return None, *formula.backward(ctx, *gradients)  # the key set has none

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(overload._schema.name.replace("::", "_"), (torch.autograd.Function,), methods)

    def kernel(keyset, *inputs):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(keyset, *inputs)
        return below(keyset, inputs)

    return kernel
