"""The selective scan with one state a channel, all directions in one block: ``kernels/cuda/tile_*.cu``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cuda_runtime import Arguments, Launcher, pointer
from .cuda_call import ACT, Call, padded_order, strides

__all__ = ["TilePlan", "backward", "forward", "macros", "plan"]

_MAX_DIRECTIONS = 8
_SHARED_AT_ONCE = 228 * 1024  # of a multiprocessor; a block takes 1 KiB more than it asks for
_MAX_WARPS = 15  # of a forward block: one of its 16 barriers is the block's own


@dataclass(frozen=True)
class Cut:
    """A way to cut the work.

    Args:
        channels: TILE_CHANNELS of ``tile_walk.cuh``.
        vec: Its VEC.
        steps: Its STEPS.
        warps: Its WARPS at most.
        warps_at_once: Warps a multiprocessor that registers must suffice for.
        most_steps: The longest path that it suits.
    """

    channels: int
    vec: int
    steps: int
    warps: int
    warps_at_once: int
    most_steps: int = 2**31


CUTS = {
    "forward": [
        Cut(64, 2, 7, 4, 15, 400), Cut(16, 2, 7, 5, 15, 1600), Cut(16, 2, 7, 12, 12), Cut(8, 2, 7, 12, 12),
    ],
    "backward": [
        Cut(64, 2, 7, 2, 8, 96), Cut(64, 2, 7, 4, 8, 400), Cut(32, 2, 7, 8, 8, 1000), Cut(16, 2, 7, 8, 8, 1600),
    ],
}  # fmt: skip
"""The ways to cut each pass, best first, as measured on an H200: where none suits, ``scan_*.cu`` are faster."""


@dataclass(frozen=True)
class TilePlan:
    """How the tile kernels are cut for a shape.

    Args:
        channels: Channels a block.
        vec: Channels a thread.
        steps: Steps a thread takes of a piece.
        warps: Warps a block.
        pieces: Pieces of a direction.
        blocks: Blocks of the launch.
        shared_bytes: Dynamic shared memory.
        min_blocks: Blocks a multiprocessor that registers must suffice for.
        full: Whether every step of every piece has a token, and every lane a channel.
        staged: Whether u and delta are copied to shared memory past the first-level cache.
    """

    channels: int
    vec: int
    steps: int
    warps: int
    pieces: int
    blocks: int
    shared_bytes: int
    min_blocks: int
    full: bool
    staged: bool = False

    @property
    def num_steps(self) -> int:
        """Steps of a direction, with those that pad the last pieces."""
        return self.pieces * 32 * self.vec // self.channels * self.steps


def _shared_words(kind: str, channels: int, vec: int, steps: int, warps: int, pieces: int) -> int:
    """Return the floats of shared memory beside the tile: as the kernels lay it out."""
    common = warps * 4 * (32 * vec // channels) * (-(-steps // 4) * 4) + 3 * _MAX_DIRECTIONS * channels
    if kind == "forward":
        return common + warps * channels
    return common + (max(4 * warps, 3 * (32 * warps // channels)) + 3 * pieces) * channels


def copied_bytes(call: Call) -> int:
    """Return the bytes of a step's u and delta for a channel, or 0 where 16 bytes do not divide all their rows."""
    for x in (call.u, call.delta):
        places = (x.data_ptr(), *(n * x.element_size() for n in (call.channels, *x.stride()[:-1])))
        if any(place % 16 for place in places):
            return 0
    return call.u.element_size() + call.delta.element_size()


def plan(
    kind: str,
    batch: int,
    num_tokens: int,
    num_steps: int,
    channels: int,
    directions: int,
    vec: int,
    merge: bool,
    complete: bool,
    launcher: Launcher,
    copied: int = 0,
) -> TilePlan | None:
    """Cut a shape into blocks; None where another kernel suits it better.

    Args:
        kind: ``"forward"`` or ``"backward"``.
        batch: B.
        num_tokens: L.
        num_steps: P.
        channels: D.
        directions: K.
        vec: Most channels that can be read at a time.
        merge: Whether the directions' results are summed in shared memory.
        complete: Whether every direction visits every token.
        launcher: The device.
        copied: What :func:`copied_bytes` says of a forward's arguments.
    """
    for cut in CUTS[kind]:
        if num_steps > cut.most_steps or 1 < vec < cut.vec or directions > _MAX_DIRECTIONS:
            continue
        width = min(cut.vec, vec)
        tile = min(cut.channels, 32 * width)
        piece = 32 * width // tile * cut.steps
        pieces = -(-num_steps // piece)
        most_warps = min(cut.warps, pieces, _MAX_WARPS)
        blocks = batch * -(-channels // tile)
        fewer = range(most_warps, most_warps // 2, -1) if copied else ()  # faster than more that do not copy
        for warps, staged in [*((n, copied) for n in fewer), (most_warps, 0)]:
            words = _shared_words(kind, tile, width, cut.steps, warps, pieces) + (num_tokens * tile if merge else 0)
            shared_bytes = 4 * words + warps * piece * tile * staged
            if shared_bytes <= launcher.shared_bytes:
                break
        else:
            continue
        if 2 * blocks < launcher.multiprocessors and pieces > cut.warps:
            return None  # too few blocks for long paths
        at_once = max(1, min(32, cut.warps_at_once // warps, _SHARED_AT_ONCE // (shared_bytes + 1024)))
        full = complete and num_steps == num_tokens == pieces * piece and channels % tile == 0
        return TilePlan(tile, width, cut.steps, warps, pieces, blocks, shared_bytes, at_once, full, staged > 0)
    return None


def macros(
    dtype: torch.dtype, tile: TilePlan, flags: dict[str, int], *, merge, complete, shared, gate
) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file; ``shared``: the directions read one u and one dy."""
    return {
        "ACT": ACT[dtype],
        "TILE_CHANNELS": tile.channels,
        "VEC": tile.vec,
        "STEPS": tile.steps,
        "WARPS": tile.warps,
        "MIN_BLOCKS": tile.min_blocks,
        **flags,
        "MERGE": int(merge),
        "COMPLETE": int(complete),
        "FULL": int(tile.full),
        "ONE_SKIP": int(merge and complete and shared),
        "GATE": int(gate),
        "STAGED": int(tile.staged),
    }


def _run(call: Call, tile: TilePlan, name: str, merge: bool, gate: bool, activations, tensors) -> None:
    flat = [strides(x) for x in (call.u, call.delta, call.B, call.C, *activations)]
    u, delta, B, C, z, dy = map(pointer, (call.u, call.delta, call.B, call.C, *activations))
    order = padded_order(call.path, call.grid, call.u.device, tile.num_steps)
    parameters = map(pointer, (call.A, call.D, call.bias, order, *tensors))
    wide = (u, delta, B, C, z, dy, *parameters, *(stride[0] for stride in flat))
    sizes = (call.num_tokens, tile.num_steps, call.channels, call.directions, -(-call.channels // tile.channels))
    narrow = (*(value for stride in flat for value in stride[1:]), *sizes, tile.pieces)
    shared = all(x is None or x.dim() == 3 for x in (call.u, activations[1]))
    specialisation = macros(
        call.u.dtype, tile, call.flags, merge=merge, complete=call.visits.complete, shared=shared, gate=gate
    )
    arguments = Arguments(wide, narrow)
    call.launcher.run(f"{name}.cu", name, specialisation, tile.blocks, 32 * tile.warps, arguments, tile.shared_bytes)


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
    dparams = call.empty(call.batch * call.parameter_rows, 3 * call.directions * call.channels)
    dstate = None if initial is None else torch.empty_like(initial)
    tensors = (initial, dlast, None, None, du, ddelta, dBC, dparams, dstate)
    _run(call, tile, "tile_backward", merge, False, (None, dy), tensors)
    return du, ddelta, *call.projections(dBC, tiles), *call.parameters(dparams), dstate
