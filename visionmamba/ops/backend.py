"""Which implementation of an operator runs, and why the others do not.

Every operator has several implementations of the same function ("backends"). They register themselves here with a
``probe`` (can it run on this machine at all?) and a ``supports`` check (can it take this call?). The first one in order
of preference that answers yes to both runs; nothing else decides, so ``visionmamba doctor`` can always say what runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any

__all__ = [
    "BACKENDS",
    "Implementation",
    "backend",
    "explain",
    "operators",
    "register_implementation",
    "requested_backend",
    "select",
    "state",
    "watch_choices",
]

BACKENDS = ("cuda", "triton", "cpu", "torch")
"""Backends in order of preference."""

_ENVIRONMENT_VARIABLE = "VISIONMAMBA_BACKEND"
_VARIABLE_KEY = os.fsencode(_ENVIRONMENT_VARIABLE) if os.supports_bytes_environ else _ENVIRONMENT_VARIABLE


def _always(*_args: Any, **_kwargs: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator.

    Args:
        op: Operator name, e.g. ``"selective_scan"``.
        backend: One of :data:`BACKENDS`.
        device_types: Device types it runs on (``torch.device.type``); empty means any.
        forward: The forward function; all implementations of an operator share one signature.
        backward: The backward function, likewise.
        probe: Returns None if it can run on this machine, else the reason why not. Called once.
        supports: Takes the forward's arguments; returns None if it can take this call, else the reason why not.
        failures: Exceptions of the forward or backward which say that it cannot run on this machine after all (a kernel
            that does not compile or load). It is then left out from there on, with one warning, and the next backend
            takes the call; unless this one was asked for by name.
    """

    op: str
    backend: str
    device_types: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    probe: Callable[[], str | None] = field(default=_always)
    supports: Callable[..., str | None] = field(default=_always)
    failures: tuple[type[Exception], ...] = ()


_implementations: dict[str, dict[str, Implementation]] = {}
_registrations = 0
_forced: list[str] = []
_failed: dict[tuple[str, str], str] = {}
_environment = os.environb if os.supports_bytes_environ else os.environ  # the first looks nothing up in a codec


class _Thread(threading.local):
    """Who watches a thread's choices."""

    watcher: Callable[[Implementation], None] | None = None


_thread = _Thread()


def register_implementation(implementation: Implementation) -> None:
    """Make an implementation eligible for its operator.

    Args:
        implementation: What to register; it replaces an earlier one of the same operator and backend.

    Raises:
        ValueError: The backend's name is not in :data:`BACKENDS`.
    """
    if implementation.backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {implementation.backend!r}")
    if implementation.failures:
        implementation = _with_fallback(implementation)
    global _registrations
    _registrations += 1
    _implementations.setdefault(implementation.op, {})[implementation.backend] = implementation
    _failed.pop((implementation.op, implementation.backend), None)
    _probe.cache_clear()


def _with_fallback(implementation: Implementation) -> Implementation:
    """Wrap the forward and the backward so that a failure hands the call to the next backend."""
    op, name = implementation.op, implementation.backend

    def guard(function: Callable[..., Any], which: str, cotangents: int) -> Callable[..., Any]:
        @wraps(function)
        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except implementation.failures as error:
                if requested_backend() == name:
                    raise
                first_time = (op, name) not in _failed
                _failed[op, name] = f"failed here: {error}"
                forward_arguments = arguments[cotangents:]
                device = next(x.device.type for x in forward_arguments if hasattr(x, "device"))
                successor = select(op, device, *forward_arguments)
                if first_time:
                    message = (
                        f"{op}: backend {name!r} failed and is left out; {successor.backend!r} runs instead: {error}"
                    )
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
                return getattr(successor, which)(*arguments)

        return guarded

    backward = implementation.backward
    # Every backward takes the cotangents of two outputs before the forward's arguments.
    guarded_backward = None if backward is None else guard(backward, "backward", 2)
    return replace(implementation, forward=guard(implementation.forward, "forward", 0), backward=guarded_backward)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend.

    Args:
        name: One of :data:`BACKENDS`.

    Raises:
        ValueError: The name is not a backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def requested_backend() -> str | None:
    """Return the backend that a ``with backend(...)`` block or ``VISIONMAMBA_BACKEND`` asks for, if any."""
    if _forced:
        return _forced[-1]
    name = _environment.get(_VARIABLE_KEY)
    if not name:
        return None
    name = os.fsdecode(name)
    if name not in BACKENDS:
        raise ValueError(f"{_ENVIRONMENT_VARIABLE}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@cache
def _probe(op: str, name: str) -> str | None:
    return _implementations[op][name].probe()


def _backends_of(op: str) -> dict[str, Implementation]:
    if op not in _implementations:
        raise ValueError(f"op: expected one of {', '.join(operators())}, got {op!r}")
    return _implementations[op]


def _objection(implementation: Implementation, device_type: str, arguments: tuple[Any, ...]) -> str | None:
    """Return why an implementation cannot take a call, or None."""
    if implementation.device_types and device_type not in implementation.device_types:
        return f"runs on {', '.join(implementation.device_types)}, not on {device_type}"
    failed = _failed.get((implementation.op, implementation.backend))
    if failed is not None and requested_backend() != implementation.backend:
        return failed
    return _probe(implementation.op, implementation.backend) or (
        implementation.supports(*arguments) if arguments else None
    )


def select(op: str, device_type: str, *arguments: Any) -> Implementation:
    """Choose the implementation that runs a call.

    Args:
        op: Operator name.
        device_type: ``torch.device.type`` of the inputs.
        *arguments: The forward's arguments, for the implementations' ``supports`` checks.

    Returns:
        The forced implementation if one is forced, else the first eligible one in order of preference.

    Raises:
        RuntimeError: The forced backend does not exist for the operator or cannot take the call.
    """
    chosen = _choose(op, device_type, arguments)
    if _thread.watcher is not None:
        _thread.watcher(chosen)
    return chosen


def _choose(op: str, device_type: str, arguments: tuple[Any, ...]) -> Implementation:
    table = _backends_of(op)
    forced = requested_backend()
    if forced is not None:
        if forced not in table:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for; it has {', '.join(table)}")
        objection = _objection(table[forced], device_type, arguments)
        if objection is not None:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for but cannot run this call: {objection}")
        return table[forced]
    for name in BACKENDS:
        if name in table and _objection(table[name], device_type, arguments) is None:
            return table[name]
    raise RuntimeError(f"{op}: no backend can run on {device_type}: {explain(op, device_type)}")


@contextlib.contextmanager
def watch_choices(watcher: Callable[[Implementation], None]) -> Iterator[None]:
    """Call a function with each implementation that this thread selects inside the ``with`` block."""
    before, _thread.watcher = _thread.watcher, watcher
    try:
        yield
    finally:
        _thread.watcher = before


def state() -> tuple[str | None, int, int]:
    """Return what decides :func:`select` beside its arguments: what is asked for, is there, and has failed."""
    return requested_backend(), _registrations, len(_failed)


def explain(op: str, device_type: str) -> dict[str, str | None]:
    """Say for each backend of an operator why it cannot run on a device.

    Args:
        op: Operator name.
        device_type: ``torch.device.type``.

    Returns:
        Backend name to reason, None where it can run, in order of preference.

    Raises:
        ValueError: There is no such operator.
    """
    table = _backends_of(op)
    return {name: _objection(table[name], device_type, ()) for name in BACKENDS if name in table}


def operators() -> list[str]:
    """Return the names of all operators that have implementations."""
    return sorted(_implementations)
