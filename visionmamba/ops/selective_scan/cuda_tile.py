"""The selective scan with one state a channel, all directions in one block: ``kernels/cuda/tile_scan.cu``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cuda_runtime import Arguments, Launcher, pointer
from .cuda_call import ACT, Call, padded_order, strides

__all__ = ["TilePlan", "backward", "forward", "macros", "plan"]

_FILE = "tile_scan.cu"
_STEPS = {"forward": 8, "backward": 8}
_WIDTHS = (16, 8)  # channels a block, best first
_MAX_THREADS = 384
_MAX_ROUNDS = 64


@dataclass(frozen=True)
class TilePlan:
    """How ``tile_scan.cu`` is cut for a shape.

    Args:
        channels: Channels a block.
        steps: Steps a thread and round.
        threads: Threads a block.
        rounds: Rounds that a direction takes.
        blocks: Blocks of the launch.
        shared_bytes: Dynamic shared memory.
    """

    channels: int
    steps: int
    threads: int
    rounds: int
    blocks: int
    shared_bytes: int


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
        vec: Channels a thread.
        merge: Whether the directions' results are summed in shared memory.
        launcher: The device.
    """
    steps = _STEPS[kind]
    for width in _WIDTHS:
        lanes = width // vec
        blocks = batch * -(-channels // width)
        rounds = -(-num_steps // (_MAX_THREADS // lanes * steps))
        chunks = -(-num_steps // (rounds * steps))
        threads = -(-chunks * lanes // 64) * 64
        words = 4 * threads // 32 * width if kind == "forward" else 11 * threads // 32 * width + rounds * width
        shared_bytes = 4 * (words + ((num_tokens + 1) * width if merge else 0))
        if shared_bytes <= launcher.shared_bytes:
            few = 2 * blocks < launcher.multiprocessors and num_steps > _MAX_THREADS
            return (
                None if few or rounds > _MAX_ROUNDS else TilePlan(width, steps, threads, rounds, blocks, shared_bytes)
            )
    return None


def macros(
    dtype: torch.dtype, tile: TilePlan, vec: int, flags: dict[str, int], *, merge, complete, gate
) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file."""
    return {
        "ACT": ACT[dtype],
        "TILE_CHANNELS": tile.channels,
        "VEC": vec,
        "STEPS": tile.steps,
        "THREADS": tile.threads,
        "MIN_BLOCKS": 1,
        **flags,
        "MERGE": int(merge),
        "COMPLETE": int(complete),
        "GATE": int(gate),
    }


def _run(call: Call, tile: TilePlan, name: str, merge: bool, gate: bool, activations, tensors) -> None:
    flat = [strides(x) for x in (call.u, call.delta, call.B, call.C, *activations)]
    u, delta, B, C, z, dy = map(pointer, (call.u, call.delta, call.B, call.C, *activations))
    steps = tile.rounds * tile.threads * call.vec // tile.channels * tile.steps
    order = padded_order(call.path, call.grid, call.u.device, steps)
    parameters = map(pointer, (call.A, call.D, call.bias, order, *tensors))
    wide = (u, delta, B, C, z, dy, *parameters, *(stride[0] for stride in flat))
    sizes = (call.num_tokens, steps, call.channels, call.directions, -(-call.channels // tile.channels))
    narrow = (*(value for stride in flat for value in stride[1:]), *sizes, tile.rounds)
    specialisation = macros(
        call.u.dtype, tile, call.vec, call.flags, merge=merge, complete=call.visits.complete, gate=gate
    )
    call.launcher.run(
        _FILE, name, specialisation, tile.blocks, tile.threads, Arguments(wide, narrow), tile.shared_bytes
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
