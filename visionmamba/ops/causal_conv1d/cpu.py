"""The causal depthwise convolution on CPUs: fused kernels, compiled by numba; see ``kernels/cpu``."""

from __future__ import annotations

from array import array
from functools import lru_cache

import numpy as np
import torch

from .. import _numba
from .._numba_call import LANES, Call, Partials, Plan, activation, parameter, record_type, tables
from ..backend import Implementation, register_implementation

__all__ = ["backward", "forward"]


@lru_cache(maxsize=256)
def _plan(batch, tokens, weight_shape, path, grid, silu, backward) -> Plan:
    path_tables = tables(path, grid)
    directions, channels, _ = weight_shape
    steps, blocks = path_tables.token.shape[1], -(-channels // LANES)
    call = np.zeros(1, record_type("causal_conv1d"))[0]
    call["batch"], call["tokens"] = batch, tokens
    call["directions"], call["channels"], call["width"] = weight_shape
    call["silu"], call["covered"], call["steps"] = silu, path_tables.covered, steps
    call["token_table"], call["step_counts"] = path_tables.token.ctypes.data, path_tables.counts.ctypes.data
    call["tasks"] = batch * blocks
    kernel = ("causal_conv1d", "backward" if backward else "forward")
    cost = batch * blocks * directions * steps * (100 if backward else 30)
    return Plan(kernel, array("q", call.tolist()), path_tables, int(call["tasks"]), cost)


def _prepare(backward, x, weight, bias, seq_idx, initial_states, path, grid, silu) -> Call:
    call = Call(_plan(x.shape[0], x.shape[1], tuple(weight.shape), path, tuple(grid), silu, backward))
    call.view("x", activation(x))
    for name, tensor in (("weight", weight), ("bias", bias), ("initial", initial_states)):
        call.dense(name, parameter(tensor))
    call.dense("sequence", None if seq_idx is None else seq_idx.int().contiguous())
    return call


def forward(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the op ``visionmamba::causal_conv1d``; see :func:`visionmamba.ops.causal_conv1d`."""
    call = _prepare(False, x, weight, bias, seq_idx, initial_states, path, grid, silu)
    directions, channels, width = weight.shape
    out = torch.empty((x.shape[0], x.shape[1], directions, channels))
    final = torch.empty((x.shape[0], directions, channels, width - 1))
    call.view("out", out)
    call.dense("final", final)
    call.run()
    return out.to(x.dtype), final.to(x.dtype)


def backward(dout, dfinal, x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the gradients of x, weight, bias and initial_states; None for absent ones."""
    call = _prepare(True, x, weight, bias, seq_idx, initial_states, path, grid, silu)
    partials = Partials(call)
    dx = torch.empty(x.shape)
    dinitial = None if initial_states is None else torch.empty(initial_states.shape)
    call.view("dout", activation(dout))
    call.dense("dfinal", parameter(dfinal))
    call.view("dx", dx)
    call.dense("dinitial", dinitial)
    dweight = partials.total("dweight", weight, x.shape[0], False)
    dbias = partials.total("dbias", bias, x.shape[0], False)
    call.run()
    partials.add()
    return dx, dweight, dbias, dinitial


def _probe() -> str | None:
    return _numba.probe("causal_conv1d", "forward", "backward") or _numba.probe("reduce", "sum_partials")


def _supports(x, weight, *_arguments) -> str | None:
    if x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    return "weight is empty" if 0 in weight.shape else None


register_implementation(Implementation("causal_conv1d", "cpu", ("cpu",), forward, backward, _probe, _supports))
