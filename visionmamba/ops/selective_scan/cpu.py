"""The selective scan on CPUs: fused kernels, compiled by numba; see ``kernels/cpu``."""

from __future__ import annotations

from array import array
from functools import lru_cache

import numpy as np
import torch

from .. import _numba
from .._numba_call import LANES, Call, Partials, Plan, activation, parameter, record_type, tables
from ..backend import Implementation, register_implementation

__all__ = ["backward", "forward"]

_MAX_GROUPS = 8
"""Partial sums of dB, dC and the low-rank ddelta that a call keeps at most."""


@lru_cache(maxsize=256)
def _plan(sizes, path, grid, softplus, merge, gated, in_step_order, backward) -> Plan:
    from visionmamba.kernels.cpu.selective_scan import scratch_layout

    batch, tokens, directions, channels, states, rank = sizes
    path_tables = tables(path, grid, in_step_order)
    blocks = -(-channels // LANES)
    segment = 64 if not backward else max(8, min(64, 256 // states))
    steps = path_tables.token.shape[1]
    call = np.zeros(1, record_type("selective_scan"))[0]
    call["batch"], call["tokens"], call["directions"] = batch, tokens, directions
    call["channels"], call["states"], call["rank"] = channels, states, rank
    call["softplus"], call["merge"], call["covered"], call["z"] = softplus, merge, path_tables.covered, gated
    call["token_table"], call["row_table"] = path_tables.token.ctypes.data, path_tables.row.ctypes.data
    call["step_counts"], call["steps"] = path_tables.counts.ctypes.data, steps
    call["segment"], call["segments"] = segment, -(-steps // segment)
    call["groups"] = min(blocks, _MAX_GROUPS)
    call["tasks"] = batch * (int(call["groups"]) if backward else blocks)
    call["scratch_bytes"] = scratch_layout(call, backward)
    cost = batch * blocks * directions * steps * (15 * states + 2 * rank + 40) * (4 if backward else 1)
    kernel = ("selective_scan", "backward" if backward else "forward")
    return Plan(kernel, array("q", call.tolist()), path_tables, int(call["tasks"]), cost)


def _prepare(backward, u, delta, A, B, C, D, z, bias, dt_weight, initial, path, grid, softplus, merge, in_step_order):
    directions, channels, states = A.shape
    rank = 0 if dt_weight is None else dt_weight.shape[2]
    sizes = (u.shape[0], u.shape[1], directions, channels, states, rank)
    call = Call(_plan(sizes, path, tuple(grid), softplus, merge, z is not None, in_step_order, backward))
    for name, tensor in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
        call.view(name, None if tensor is None else activation(tensor))
    for name, tensor in (("A", A), ("D", D), ("bias", bias), ("dt_weight", dt_weight), ("initial", initial)):
        call.dense(name, parameter(tensor))
    return call


def forward(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
):
    """Compute the op ``visionmamba::selective_scan``; see :func:`visionmamba.ops.selective_scan`."""
    call = _prepare(
        False, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
        in_step_order,
    )  # fmt: skip
    batch, tokens = u.shape[:2]
    directions, channels, _ = A.shape
    y = torch.empty((batch, tokens, channels) if merge else (batch, tokens, directions, channels))
    last = torch.empty((batch, *A.shape))
    call.view("y", y)
    call.dense("last", last)
    call.run()
    return y.to(u.dtype), last


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    in_step_order,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s ten tensor arguments; None for absent ones."""
    call = _prepare(
        True, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
        in_step_order,
    )  # fmt: skip
    batch, groups, covered = u.shape[0], call["groups"], call.plan.tables.covered
    partials = Partials(call)
    call.view("dy", activation(dy))
    call.dense("dlast", parameter(dlast))
    du, dz = torch.empty(u.shape), None if z is None else torch.empty(z.shape)
    call.view("du", du)
    call.view("dz", dz)
    dB, dC = partials.total("dB", B, groups, True), partials.total("dC", C, groups, True)
    if dt_weight is None:
        ddelta = torch.empty(delta.shape) if covered else torch.zeros(delta.shape)
        call.dense("ddelta", ddelta)
    else:
        ddelta = partials.total("ddelta_low_rank", delta, groups, True)
    dA, dD, dbias, ddt_weight = (
        partials.total(name, like, batch, False)
        for name, like in (("dA", A), ("dD", D), ("dbias", delta_bias), ("ddt_weight", dt_weight))
    )
    dinitial = None if initial_state is None else torch.empty(initial_state.shape)
    call.dense("dinitial", dinitial)
    call.run()
    partials.add()
    return du, ddelta, dA, dB, dC, dD, dz, dbias, ddt_weight, dinitial


def _probe() -> str | None:
    return _numba.probe("selective_scan", "forward", "backward") or _numba.probe("reduce", "sum_partials")


def _supports(u, delta, A, *_arguments) -> str | None:
    if u.dtype == torch.float64:
        return "computes in float32, and u is float64"
    if A.is_complex():
        return "computes with real A"
    if 0 in A.shape:
        return "A is empty"
    return None


register_implementation(Implementation("selective_scan", "cpu", ("cpu",), forward, backward, _probe, _supports))
