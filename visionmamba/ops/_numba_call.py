"""What the CPU operators share: paths and tensors as the kernels read them, and sums of partial results."""

from __future__ import annotations

import importlib
from array import array
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from . import _numba
from .scan_path import scan_path

__all__ = ["Call", "Partials", "Plan", "Tables", "activation", "parameter", "tables"]

LANES = 16


class Tables(NamedTuple):
    """A path as the kernels read it: steps without a token are left out."""

    token: np.ndarray  # (K, P) int32
    row: np.ndarray  # (K, P) int32, the row of delta, B and C
    counts: np.ndarray  # (K,) int64
    covered: bool  # every direction visits every token once


@lru_cache(maxsize=512)
def tables(path: str, grid: tuple[int, ...], in_step_order: bool = False) -> Tables:
    """Build (or take from the cache) the tables of a path; see :class:`Tables`."""
    scan = scan_path(path, grid)
    token, row = np.zeros_like(scan.order), np.zeros_like(scan.order)
    counts = np.zeros(len(scan.order), np.int64)
    for k, order in enumerate(scan.order):
        steps = np.flatnonzero(order >= 0)
        counts[k] = len(steps)
        token[k, : len(steps)] = order[steps]
        row[k, : len(steps)] = steps if in_step_order else order[steps]
    every_token = np.arange(scan.num_tokens)
    covered = all(np.array_equal(np.sort(order[order >= 0]), every_token) for order in scan.order)
    return Tables(token, row, counts, covered)


class Plan(NamedTuple):
    """What calls of the same sizes share."""

    kernel: tuple[str, str]
    record: array
    tables: Tables  # keeps the memory alive that the record points to
    tasks: int
    cost: int  # vector operations, roughly


_INLINE_COST = 50_000
"""Calls of fewer vector operations run on the calling thread: waking another takes as long."""


def activation(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float32 tensor whose last dimension is contiguous."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def parameter(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a contiguous float32 tensor."""
    return None if tensor is None else tensor.float().contiguous()


@cache
def record_type(module: str) -> np.dtype:
    """Return the record of a module of kernels."""
    return importlib.import_module(f"visionmamba.kernels.cpu.{module}").CALL


@cache
def _index(module: str) -> dict[str, int]:
    return {name: i for i, name in enumerate(record_type(module).names)}


class Call:
    """The record of one call, an array of int64, and the tensors whose memory it points to."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.record = array("q", plan.record)
        self.index = _index(plan.kernel[0])
        self._alive: list[torch.Tensor] = []

    def __getitem__(self, name: str) -> int:
        return self.record[self.index[name]]

    def view(self, name: str, tensor: torch.Tensor | None) -> None:
        """Pass a tensor (B, L, D) or (B, L, K, D) with its strides, or none."""
        if tensor is None:
            return
        self._alive.append(tensor)
        strides = tensor.stride()
        direction = strides[2] if len(strides) == 4 else 0
        i = self.index[name]
        self.record[i] = tensor.data_ptr()
        self.record[i + 1], self.record[i + 2], self.record[i + 3] = 4 * strides[0], 4 * strides[1], 4 * direction

    def dense(self, name: str, tensor: torch.Tensor | None) -> None:
        """Pass a contiguous tensor, or none."""
        if tensor is not None:
            self._alive.append(tensor)
            self.record[self.index[name]] = tensor.data_ptr()

    def run(self) -> None:
        """Run the kernel on torch's threads."""
        threads = 1 if self.plan.cost < _INLINE_COST else max(1, min(torch.get_num_threads(), self.plan.tasks))
        if "scratch" in self.index:
            scratch = torch.empty(threads * self["scratch_bytes"], dtype=torch.uint8)
            self.dense("scratch", scratch)
        _numba.run(_numba.compile_kernel(*self.plan.kernel), self.record, threads)


class Partials:
    """Partial sums that tasks write, and their totals."""

    def __init__(self, call: Call):
        self._call = call
        self._items: list[int] = []
        self._chunks = 0
        self._alive: list[torch.Tensor] = []

    def total(self, name: str, like: torch.Tensor | None, parts: int, zero: bool) -> torch.Tensor | None:
        """Let the call write ``parts`` partial sums of a tensor.

        Args:
            name: The record's field for the partial sums, ``(parts, *like.shape)``.
            like: A tensor of the total's shape; None if there is nothing to sum.
            parts: How many parts.
            zero: Start the parts at 0.

        Returns:
            The total, valid after :meth:`add`.
        """
        from visionmamba.kernels.cpu.reduce import CHUNK

        if like is None:
            return None
        partial = (torch.zeros if zero else torch.empty)((parts, *like.shape))
        self._call.dense(name, partial)
        if parts == 1:
            return partial[0]
        total = torch.empty(like.shape) if parts else torch.zeros(like.shape)
        if parts and total.numel():
            self._alive += [partial, total]
            self._items += [partial.data_ptr(), total.data_ptr(), parts, total.numel()]
            self._chunks += -(-total.numel() // CHUNK)
        return total

    def add(self) -> None:
        """Sum the partial sums, always in the same order."""
        if self._chunks:
            items = array("q", self._items)
            record = array("q", (0, self._chunks, items.buffer_info()[0], len(items) // 4))
            threads = 1 if self._chunks < 4 else min(torch.get_num_threads(), self._chunks)
            _numba.run(_numba.compile_kernel("reduce", "sum_partials"), record, threads)
