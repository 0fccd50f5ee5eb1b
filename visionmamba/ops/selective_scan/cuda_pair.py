"""The one-state scan's backward, a direction and its reverse at a time: ``kernels/cuda/pair_*.cu``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..cuda_runtime import Arguments, pointer
from ..scan_path import scan_path
from .cuda_call import ACT, Call, padded_order, strides

__all__ = ["PairPlan", "backward", "macros", "pairs_of", "plan"]

# As in pair_walk.cuh and pair_backward.cu.
_TILE, _VEC, _PIECE, _ROW, _SUMS = 32, 2, 14, 16, 16
_MAX_PAIRS = 4
_WARPS = 4
_ROUNDS = 7  # pieces that a warp takes at most
_BLOCKS = {"pair_links": 4, "pair_backward": 2}  # blocks a multiprocessor that registers must suffice for
_PARTS = ((8, 7), (8, 14), (8, 28), (16, 28))  # threads a channel of pair_combine, pieces in the registers of each
_LEAST_STEPS, _MOST_STEPS = 700, 1 << 17  # shorter paths have the tile kernel; of longer ones nothing is known


@dataclass(frozen=True)
class PairPlan:
    """How the kernels are cut for a shape.

    Args:
        pairs: Each direction and its reverse.
        pieces: Pieces of a direction.
        rounds: Pieces that a warp takes.
        full: Whether every step of every piece has a token, and every lane a channel.
    """

    pairs: tuple[tuple[int, int], ...]
    pieces: int
    rounds: int
    full: bool

    @property
    def groups(self) -> int:
        """Blocks that share the pieces of a pair and a tile of channels."""
        return -(-self.pieces // (_WARPS * self.rounds))


@lru_cache(maxsize=512)
def pairs_of(path: str, grid: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return the directions as pairs of one and its reverse; empty where some have none."""
    order = scan_path(path, grid).order
    left, pairs = list(range(len(order))), []
    while left:
        k = left.pop(0)
        reverse = next((i for i in left if (order[i][::-1] == order[k]).all()), None)
        if reverse is None:
            return ()
        left.remove(reverse)
        pairs.append((k, reverse))
    return tuple(pairs)


def _copyable(call: Call, dy: Tensor) -> bool:
    """Return whether 16 bytes divide all rows that are copied 16 bytes at a time."""
    places = [call.channels * call.u.element_size()]
    for x in (call.u, call.delta, dy):
        places += [x.data_ptr(), *(n * x.element_size() for n in x.stride()[:-1])]
    return all(place % 16 == 0 for place in places)


def plan(call: Call, dy: Tensor, least_steps: int = _LEAST_STEPS, most_steps: int = _MOST_STEPS) -> PairPlan | None:
    """Cut a call; None where other kernels must do it or suit it better.

    Args:
        call: The call.
        dy: The result's gradient.
        least_steps: The shortest path to take.
        most_steps: The longest.
    """
    shared = call.u.dim() == dy.dim() == 3 and call.states == 1 and call.u.dtype != torch.float32
    if not shared or call.flags["STEP_ORDER"] or not least_steps <= call.num_steps <= most_steps:
        return None
    pairs = pairs_of(call.path, call.grid)
    if not 0 < len(pairs) <= _MAX_PAIRS or not call.visits.complete or not _copyable(call, dy):
        return None
    if _shared_bytes(call, "pair_backward", first=False) > call.launcher.shared_bytes:
        return None
    pieces = -(-call.num_steps // _PIECE)
    rounds = min(_ROUNDS, -(-pieces // _WARPS))
    whole = call.num_steps == call.num_tokens == pieces * _PIECE and call.channels % _TILE == 0
    return PairPlan(pairs, pieces, rounds, whole)


def _parts(pieces: int) -> tuple[int, int]:
    """Return how many threads combine the pieces of a channel, and how many pieces of each stay in registers."""
    return next(((parts, length) for parts, length in _PARTS if parts * length >= pieces), (32, 0))


def macros(dtype: torch.dtype, cut: PairPlan, flags: dict[str, int], name: str, pair: int = 0) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file ``name``; ``pair``: which of the pairs it is for."""
    chosen = {name: flags[name] for name in ("DELTA_FLOAT", "SOFTPLUS")}
    chosen |= {"ACT": ACT[dtype], "WARPS": _WARPS, "MIN_BLOCKS": _BLOCKS[name], "ROUNDS": cut.rounds}
    if name == "pair_links":
        parts, length = _parts(cut.pieces)
        chosen |= {"PARTS": parts, "LENGTH": length}
    if name == "pair_backward":
        chosen |= {"FIRST": int(pair == 0), "LAST": int(pair == len(cut.pairs) - 1)}
    return chosen | {"FULL": int(cut.full)}


def _shared_bytes(call: Call, name: str, first: bool) -> int:
    """Return a block's shared memory: as the kernels lay it out."""
    copied = 2 * _PIECE * _TILE * (call.u.element_size() + call.delta.element_size())
    warp = 24 * _ROW + 2 * copied
    if name == "pair_backward":
        warp += 2 * (16 * _TILE + (0 if first else 4 * _PIECE * _TILE))
        warp += 4 * (32 * (_SUMS + 4) + 2 * 16 + 4 * 32 * _VEC)
    return _WARPS * warp + 16 * _TILE


def backward(call: Call, cut: PairPlan, dy: Tensor, dlast: Tensor | None, initial: Tensor | None):
    """Return du, ddelta, dA, dB, dC, dD, dbias and the gradient of the initial state."""
    batch, tokens, directions, channels = call.batch, call.num_tokens, call.directions, call.channels
    tiles = -(-channels // _TILE)
    du = call.empty(batch, tokens, channels, dtype=call.u.dtype)
    before = call.empty(batch, tokens, channels) if len(cut.pairs) > 1 else du  # du is not read then
    ddelta = call.empty(batch, tokens, directions, channels, dtype=call.delta.dtype)
    dBC = call.empty(batch, directions, tiles, tokens, 2)
    dparams = call.empty(batch * cut.groups, 3 * directions * channels)
    dstate = None if initial is None else torch.empty_like(initial)
    spans = call.empty(batch, directions, cut.pieces, channels)
    links = call.empty(batch, directions, cut.pieces, channels, 2)
    order = padded_order(call.path, call.grid, call.u.device, cut.pieces * _PIECE)
    flat = [strides(x) for x in (call.u, call.delta, call.B, call.C, dy)]
    tensors = (call.u, call.delta, call.B, call.C, dy, call.A, call.D, call.bias, order, initial, dlast)
    results = (du, before, ddelta, dBC, dparams, dstate, spans, links)
    wide = (*map(pointer, (*tensors, *results)), *(stride[0] for stride in flat))
    u, delta, B, C, out = (stride[1:] for stride in flat)
    sizes = (tokens, cut.pieces * _PIECE, channels, directions, tiles, cut.pieces, cut.groups, batch)

    def run(name: str, pairs: tuple[tuple[int, int], ...], first: bool = True, last_first: bool = False) -> None:
        ahead, back = ([pair[i] for pair in pairs] + [0] * (_MAX_PAIRS - len(pairs)) for i in range(2))
        narrow = (u[0], *delta, *B, *C, out[0], *sizes, int(last_first), len(pairs), *ahead, *back)
        file = "pair_backward" if name == "pair_backward" else "pair_links"
        blocks, threads = batch * len(pairs) * cut.groups * tiles, 32 * _WARPS
        shared_bytes = _shared_bytes(call, name, first)
        if name == "pair_combine":
            blocks, threads = batch * directions * -(-channels // 32), 32 * _parts(cut.pieces)[0]
            shared_bytes = 0
        specialisation = macros(call.u.dtype, cut, call.flags, file, cut.pairs.index(pairs[0]))
        call.launcher.run(f"{file}.cu", name, specialisation, blocks, threads, Arguments(wide, narrow), shared_bytes)

    run("pair_links", cut.pairs)
    run("pair_combine", cut.pairs, last_first=True)
    for i, pair in enumerate(cut.pairs):
        run("pair_backward", (pair,), first=i == 0, last_first=i % 2 == 1)
    return du, ddelta, *call.projections(dBC, tiles), *call.parameters(dparams), dstate
