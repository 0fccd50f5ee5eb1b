"""The selective scan with one state a channel, all directions in one block: ``kernels/cuda/tile_*.cu``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cuda_runtime import Arguments, Launcher, pointer
from .cuda_call import ACT, Call, padded_order, strides

__all__ = ["TilePlan", "backward", "forward", "macros", "plan"]

_MAX_ROUNDS = 64
_GRAIN = {"forward": 64, "backward": 32}  # threads come in multiples of
_THREADS_AT_ONCE = 384  # a multiprocessor: leaves each 168 registers
_SHARED_AT_ONCE = 228 * 1024


@dataclass(frozen=True)
class Cut:
    """A way to cut the work.

    Args:
        channels: TILE_CHANNELS of ``tile_scan.cuh``.
        vec: Its VEC.
        steps: Its STEPS.
        threads: Its THREADS at most.
        most_steps: The longest path that it suits.
    """

    channels: int
    vec: int
    steps: int
    threads: int
    most_steps: int = 2**31


CUTS = {
    "forward": [Cut(16, 2, 8, 384), Cut(8, 2, 8, 384)],
    "backward": [Cut(32, 4, 4, 384, 96), Cut(16, 2, 8, 384, 96), Cut(8, 2, 8, 192, 400), Cut(16, 2, 4, 384, 1600)],
}
"""The ways to cut each pass, best first, as measured on an H200: where none suits, ``selective_scan.cu`` is faster."""


@dataclass(frozen=True)
class TilePlan:
    """How the tile kernels are cut for a shape.

    Args:
        channels: Channels a block.
        vec: Channels a thread.
        steps: Steps a thread and round.
        threads: Threads a block.
        rounds: Rounds that a direction takes.
        blocks: Blocks of the launch.
        shared_bytes: Dynamic shared memory.
        min_blocks: Blocks a multiprocessor that registers must suffice for.
    """

    channels: int
    vec: int
    steps: int
    threads: int
    rounds: int
    blocks: int
    shared_bytes: int
    min_blocks: int


def _shared_words(kind: str, cut: Cut, threads: int, rounds: int) -> int:
    """Return the floats of shared memory beside the tile: as the kernels lay it out."""
    warps, projections = threads // 32, 2 * threads // (cut.channels // cut.vec) * cut.steps
    if kind == "forward":
        return 4 * warps * cut.channels
    return 3 * (rounds * warps + max(warps, threads // cut.channels)) * cut.channels + projections


def plan(
    kind: str, batch: int, num_tokens: int, num_steps: int, channels: int, vec: int, merge: bool, launcher: Launcher
) -> TilePlan | None:
    """Cut a shape into blocks; None where another kernel suits it better.

    Args:
        kind: ``"forward"`` or ``"backward"``.
        batch: B.
        num_tokens: L.
        num_steps: P.
        channels: D.
        vec: Most channels that can be read at a time.
        merge: Whether the directions' results are summed in shared memory.
        launcher: The device.
    """
    for cut in CUTS[kind]:
        if num_steps > cut.most_steps or 1 < vec < cut.vec:
            continue
        cut = replace(cut, vec=min(cut.vec, vec))
        lanes = cut.channels // cut.vec
        blocks = batch * -(-channels // cut.channels)
        rounds = -(-num_steps // (cut.threads // lanes * cut.steps))
        chunks = -(-num_steps // (rounds * cut.steps))
        threads = -(-chunks * lanes // _GRAIN[kind]) * _GRAIN[kind]
        words = _shared_words(kind, cut, threads, rounds) + (num_tokens * cut.channels if merge else 0)
        if 4 * words <= launcher.shared_bytes:
            few = 2 * blocks < launcher.multiprocessors and num_steps > cut.threads
            if few or rounds > _MAX_ROUNDS:
                return None
            at_once = min(32, _THREADS_AT_ONCE // threads, _SHARED_AT_ONCE // (4 * words + 1024))
            min_blocks = 1 if kind == "forward" else max(1, at_once)
            return TilePlan(cut.channels, cut.vec, cut.steps, threads, rounds, blocks, 4 * words, min_blocks)
    return None


def macros(dtype: torch.dtype, tile: TilePlan, flags: dict[str, int], *, merge, complete, gate) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file."""
    return {
        "ACT": ACT[dtype],
        "TILE_CHANNELS": tile.channels,
        "VEC": tile.vec,
        "STEPS": tile.steps,
        "THREADS": tile.threads,
        "MIN_BLOCKS": tile.min_blocks,
        **flags,
        "MERGE": int(merge),
        "COMPLETE": int(complete),
        "ONE_ROUND": int(tile.rounds == 1),
        "GATE": int(gate),
    }


def _run(call: Call, tile: TilePlan, name: str, merge: bool, gate: bool, activations, tensors) -> None:
    flat = [strides(x) for x in (call.u, call.delta, call.B, call.C, *activations)]
    u, delta, B, C, z, dy = map(pointer, (call.u, call.delta, call.B, call.C, *activations))
    steps = tile.rounds * tile.threads * tile.vec // tile.channels * tile.steps
    order = padded_order(call.path, call.grid, call.u.device, steps)
    parameters = map(pointer, (call.A, call.D, call.bias, order, *tensors))
    wide = (u, delta, B, C, z, dy, *parameters, *(stride[0] for stride in flat))
    sizes = (call.num_tokens, steps, call.channels, call.directions, -(-call.channels // tile.channels))
    narrow = (*(value for stride in flat for value in stride[1:]), *sizes, tile.rounds)
    specialisation = macros(call.u.dtype, tile, call.flags, merge=merge, complete=call.visits.complete, gate=gate)
    call.launcher.run(
        f"{name}.cu", name, specialisation, tile.blocks, tile.threads, Arguments(wide, narrow), tile.shared_bytes
    )


def _result(call: Call, merge: bool) -> Tensor:
    middle = () if merge else (call.directions,)
    zero = not merge and not call.visits.complete
    return call.empty(call.batch, call.num_tokens, *middle, call.channels, dtype=call.u.dtype, zero=zero)


def forward(call: Call, tile: TilePlan, z: Tensor | None, initial: Tensor | None, merge: bool) -> tuple[Tensor, Tensor]:
    """Return the output and the last state."""
    y = _result(call, merge)
    last = call.empty(call.batch, call.directions, call.channels, 1)
    tensors = (initial, None, y, last, None, None, None, None, None)
    _run(call, tile, "tile_forward", merge, z is not None, (z, None), tensors)
    return y, last


def backward(call: Call, tile: TilePlan, dy: Tensor, dlast: Tensor | None, initial: Tensor | None):
    """Return du, ddelta, dA, dB, dC, dD, dbias and the gradient of the initial state."""
    merge = call.u.dim() == 3
    du = _result(call, merge)
    shape = (call.batch, call.num_tokens, call.directions, call.channels)
    ddelta = call.empty(*shape, dtype=call.delta.dtype, zero=not call.rows_read)
    tiles = -(-call.channels // tile.channels)
    dBC = call.empty(call.batch, call.directions, tiles, call.num_tokens, 2, zero=not call.rows_read)
    dparams = call.empty(call.batch, 3 * call.directions * call.channels)
    dstate = None if initial is None else torch.empty_like(initial)
    tensors = (initial, dlast, None, None, du, ddelta, dBC, dparams, dstate)
    _run(call, tile, "tile_backward", merge, False, (None, dy), tensors)
    return du, ddelta, *call.projections(dBC, tiles), *call.parameters(dparams), dstate
