"""The selective scan on NVIDIA GPUs: ``kernels/cuda/scan_*.cu``, specialised and launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .. import cuda_runtime
from ..backend import Implementation, register_implementation
from ..cuda_runtime import Arguments, pointer
from . import cuda_pair, cuda_tile
from .cuda_call import ACT, Call, is_there_and_back, rows, strides, visits
from .dt_projection import expand_delta, expand_delta_backward

__all__ = ["Tiling", "backward", "fit_vector", "forward", "macros", "pair_cut", "tilings_for"]

_MAX_STATES = 64
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut: see the head of ``scan_shared.cuh``.

    Args:
        spt: States a thread.
        cpt: Channels a thread.
        steps: Steps whose states and decays the backward holds in registers.
        windows: Such register windows a staged group.
        warps: Warps a block.
        min_blocks: Blocks a multiprocessor that registers must suffice for.
        warps_wanted: Warps a multiprocessor from which it is preferred to those after it.
        every_window: Whether the backward keeps the state before every register window, or only before every group.
    """

    spt: int
    cpt: int
    steps: int
    windows: int
    warps: int
    min_blocks: int = 1
    warps_wanted: int = 6
    every_window: bool = False

    def channels(self, states: int) -> int:
        """Channels of a warp."""
        return 32 * self.spt // _padded(states) * self.cpt

    @property
    def tile_steps(self) -> int:
        return self.steps * self.windows

    @property
    def checkpoints(self) -> int:
        """States that the backward keeps of a group of steps."""
        return self.windows if self.every_window else 1


# By states (a power of two): the first tiling that gives every multiprocessor the warps it wants; where none does, the
# first. With fewer than _WARPS_WANTED a multiprocessor the path is cut into chunks. Two or three warps where more would
# need more than 48 KiB of shared memory.
_FORWARD_TILINGS = {
    1: [Tiling(1, 2, 8, 1, 3), Tiling(1, 1, 8, 1, 4)],
    2: [Tiling(2, 2, 8, 1, 3), Tiling(2, 1, 8, 1, 4)],
    4: [Tiling(4, 2, 8, 1, 3), Tiling(4, 1, 8, 1, 4)],
    8: [Tiling(8, 2, 8, 1, 3), Tiling(8, 1, 8, 1, 4)],
    16: [Tiling(8, 2, 8, 1, 4, 4), Tiling(8, 1, 8, 1, 4)],
    32: [Tiling(8, 4, 8, 1, 3), Tiling(8, 2, 8, 1, 4)],
    64: [Tiling(8, 4, 8, 1, 3), Tiling(8, 2, 8, 1, 3)],
}
_BACKWARD_TILINGS = {
    1: [Tiling(1, 1, 16, 1, 3)],
    2: [Tiling(2, 1, 8, 1, 4)],
    4: [Tiling(4, 1, 8, 1, 4)],
    8: [Tiling(4, 2, 4, 2, 4, 3, 6, True)],
    16: [Tiling(4, 2, 4, 2, 4, 3, 12, True), Tiling(4, 2, 4, 2, 4, 2, 6, True), Tiling(4, 2, 4, 2, 4, 3, 0, True)],
    32: [Tiling(8, 1, 4, 2, 4)],
    64: [Tiling(8, 2, 2, 4, 2)],
}
_GATED_BACKWARD_TILINGS = {  # before the others where there is a gate, which takes shared memory and registers
    1: [Tiling(1, 1, 16, 1, 2, 1, 0)],
    8: [Tiling(4, 2, 4, 2, 4, 2, 0, True)],
}
_WARPS_WANTED = 6
_PAIRED_WARPS_WANTED = 12
_MIN_CHUNK = 64


def _padded(states: int) -> int:
    return 1 << (states - 1).bit_length()


def tilings_for(kind: str, states: int, architecture: str, gate: bool = False) -> list[Tiling]:
    """Return the tilings to choose from, best first.

    Args:
        kind: ``"forward"`` or ``"backward"``.
        states: N.
        architecture: e.g. ``"sm_90"``.
        gate: Whether there is a gate.
    """
    padded = _padded(states)
    tilings = (_FORWARD_TILINGS if kind == "forward" else _BACKWARD_TILINGS)[padded]
    if gate and kind == "backward":
        tilings = [*_GATED_BACKWARD_TILINGS.get(padded, []), *tilings]
    if int(architecture.removeprefix("sm_").rstrip("a")) < 100:
        return tilings
    # Blackwell's compiler needs a few more registers than three blocks a multiprocessor leave: it would spill.
    return [replace(tiling, min_blocks=min(2, tiling.min_blocks)) for tiling in tilings]


def fit_vector(tiling: Tiling, states: int, vec: int) -> Tiling:
    """Narrow a warp's channels to what it can stage ``vec`` channels at a time."""
    cpt = tiling.cpt
    while 32 * tiling.spt // _padded(states) * cpt // vec > 32:
        cpt //= 2
    return replace(tiling, cpt=cpt)


def macros(
    dtype: torch.dtype,
    states: int,
    tiling: Tiling,
    vec: int,
    flags: dict[str, int],
    *,
    gate: int = 0,
    partial: bool = False,
) -> dict[str, int]:
    """Return the macros of a specialisation of a kernel file."""
    return {
        "ACT": ACT[dtype],
        "D_STATE": states,
        "SPT": tiling.spt,
        "CPT": tiling.cpt,
        "STEPS": tiling.steps,
        "WINDOWS": tiling.windows,
        "WARPS": tiling.warps,
        "VEC": vec,
        "MIN_BLOCKS": tiling.min_blocks,
        "CHECKPOINTS": tiling.checkpoints,
        **flags,
        "GATE": gate,
        "PARTIAL": int(partial),
    }


def _fit(tiling: Tiling, channels: int, states: int, vec: int) -> tuple[Tiling, int]:
    """Leave as few warps of a block idle as can be; return the blocks that the channels take, too."""
    tiling = fit_vector(tiling, states, vec)
    needed = -(-channels // tiling.channels(states))
    warps = min(range(tiling.warps, 0, -1), key=lambda warps: -(-needed // warps) * warps)
    return replace(tiling, warps=warps), -(-needed // warps)


@lru_cache(maxsize=1024)
def _cut(
    kind: str, rows: int, channels: int, states: int, vec: int, gate: bool, architecture: str, processors: int
) -> tuple[Tiling, int]:
    """Choose how to cut a walk of ``rows`` paths; return the blocks that the channels of a path take, too."""
    cuts = [_fit(x, channels, states, vec) for x in tilings_for(kind, states, architecture, gate)]
    return next((x for x in cuts if rows * x[1] * x[0].warps >= x[0].warps_wanted * processors), cuts[0])


@lru_cache(maxsize=1024)
def pair_cut(channels: int, states: int, vec: int, tokens: int, most_bytes: int) -> tuple[Tiling, int, int] | None:
    """Choose how ``scan_paired.cu`` cuts the channels; return the blocks that they take and their outputs' bytes, too.

    None where the outputs of all tokens leave room for too few blocks.
    """
    first = _FORWARD_TILINGS[_padded(states)][0]
    tiling = fit_vector(replace(first, cpt=min(first.cpt, 2), warps=2), states, vec)
    width = tiling.channels(states)
    outputs = 4 * (tokens + 1) * width
    staged = 2 * 4 * tiling.tile_steps * 2 * (width + _padded(states))
    resident = most_bytes // (outputs + staged + 1024)
    if 2 * resident < _PAIRED_WARPS_WANTED:
        return None
    return replace(tiling, min_blocks=min(resident, _PAIRED_WARPS_WANTED // 2 + 1)), -(-channels // width), outputs


class _Scan(Call):
    """A call of ``scan_forward.cu`` or ``scan_backward.cu``: its tiles, chunks and argument struct.

    Args:
        kind: ``"forward"`` or ``"backward"``.
        arguments: Those of :class:`Call`.
        gate: Activations that gate the output, or None.
        merge: Whether the directions share the result that the kernel writes (``y``, or ``du``).
        others: More activations that the kernel will read.
    """

    def __init__(self, kind: str, *arguments, gate: Tensor | None, merge: bool, others=()):
        super().__init__(*arguments, others=[gate, *others])
        self.kernel, self.shared_bytes = f"scan_{kind}", 0
        self.partial = self.needs_merge(merge)
        self.gate = None if kind == "forward" and self.partial else gate  # else the merge applies it
        self.gate_is_shared = self.gate is not None and self.gate.dim() == 3 and self.directions > 1
        sizes = (self.batch * self.directions, self.channels, self.states, self.vec, self.gate is not None)
        self.tiling, self.tiles = _cut(kind, *sizes, self.launcher.architecture, self.launcher.multiprocessors)
        self.threads = 32 * self.tiling.warps
        gated = 0 if self.gate is None else 1 if kind == "forward" or self.gate_is_shared else 2
        options = dict(gate=gated, partial=self.partial)
        self.macros = macros(self.u.dtype, self.states, self.tiling, self.vec, self.flags, **options)

    @cached_property
    def chunking(self) -> tuple[int, int]:
        """Choose the number of chunks and their steps: one chunk wherever the rows keep the device busy.

        Elsewhere as many as the device runs at a time: blocks that wait for a place would take as long again.
        """
        group = self.tiling.tile_steps
        whole = max(group, -(-self.num_steps // group) * group)
        rows, processors = self.batch * self.directions * self.tiles, self.launcher.multiprocessors
        if rows * self.tiling.warps >= _WARPS_WANTED * processors or not rows:
            return 1, whole
        places = processors * self.launcher.resident_blocks(f"{self.kernel}.cu", self.kernel, self.macros, self.threads)
        steps = max(_MIN_CHUNK, -(-self.num_steps // max(1, places // rows)))
        steps = min(whole, -(-steps // group) * group)
        return max(1, -(-self.num_steps // steps)), steps

    @property
    def chunks(self) -> int:
        return self.chunking[0]

    @property
    def blocks(self) -> int:
        return self.batch * self.chunks * (1 if self.kernel == "scan_paired" else self.directions) * self.tiles

    def arguments(self, *, dy=None, y=None, du=None, **others: Tensor | None) -> Arguments:
        """Lay out ``ScanArgs``."""
        z = self.gate
        all_strides = [strides(x) for x in (self.u, self.delta, self.B, self.C, z, dy, y, du)]
        names = (
            "state_in", "adjoint_in", "y", "last_state", "carry_state", "carry_adjoint", "carry_delta", "du", "ddelta",
            "dBC", "dparams", "dstate", "checkpoints",
        )  # fmt: skip
        others.update(y=y, du=du)
        pointers = [pointer(x) for x in (
            self.u, self.delta, self.B, self.C, z, dy, self.A, self.D, self.bias, self.order, *map(others.get, names)
        )]  # fmt: skip
        wide = (*pointers, *(stride[0] for stride in all_strides))
        narrow = [value for stride in all_strides for value in stride[1:]]
        narrow += [self.num_tokens, self.num_steps, self.channels, self.directions, *self.chunking]
        return Arguments(wide, (*narrow, self.tiles, 0))

    def run(self, name: str, arguments: Arguments) -> None:
        file, threads, shared_bytes = f"{self.kernel}.cu", self.threads, self.shared_bytes
        self.launcher.run(file, name, self.macros, self.blocks, threads, arguments, shared_bytes)

    def pair_directions(self, z: Tensor | None) -> bool:
        """Turn a forward that merges a direction and its reverse to ``scan_paired.cu``, where that suits.

        Returns:
            Whether it did. The result is then whole, with the gate applied.
        """
        cut = pair_cut(self.channels, self.states, self.vec, self.num_tokens, self.launcher.shared_bytes)
        if cut is None or not self.partial or not is_there_and_back(self.path, self.grid) or self.chunks > 1:
            return False
        tiling, tiles, shared_bytes = cut
        if self.batch * tiles * tiling.warps < _WARPS_WANTED * self.launcher.multiprocessors:
            return False
        self.kernel, self.tiling, self.tiles, self.shared_bytes = "scan_paired", tiling, tiles, shared_bytes
        self.threads, self.partial, self.gate = 32 * tiling.warps, False, z
        self.macros = macros(self.u.dtype, self.states, tiling, self.vec, self.flags, gate=int(z is not None))
        return True

    def carries(self, initial: Tensor | None, dy: Tensor | None = None, dlast: Tensor | None = None):
        """Return the states that enter each chunk and, given ``dy``, the adjoints that enter each chunk's end."""
        if self.chunks == 1:
            return initial, dlast
        shape = (self.batch, self.directions, self.chunks, self.channels)
        state, total = self.empty(*shape, self.states), self.empty(*shape)
        adjoint = None if dy is None else self.empty(*shape, self.states)
        name = "scan_carry" if dy is None else "scan_carry_adjoint"
        self.run(name, self.arguments(dy=dy, carry_state=state, carry_adjoint=adjoint, carry_delta=total))
        rows = self.batch * self.directions
        arguments = Arguments(
            (*map(pointer, (state, adjoint, total, self.A, initial, dlast)), rows),
            (self.directions, self.channels, self.chunks, 0),
        )
        blocks = -(-rows * self.channels * self.states // 128)
        self.launcher.run(f"{self.kernel}.cu", "combine_carries", self.macros, blocks, 128, arguments)
        return state, adjoint


def _tile_plan(kind: str, call: Call, merge: bool) -> cuda_tile.TilePlan | None:
    if call.states != 1:
        return None
    sizes = (call.batch, call.num_tokens, call.num_steps, call.channels, call.directions)
    copied = cuda_tile.copied_bytes(call) if kind == "forward" else 0
    return cuda_tile.plan(kind, *sizes, call.widest, merge, call.visits.complete, call.launcher, copied)


def forward(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
):
    """Compute the op ``visionmamba::selective_scan``; see :func:`visionmamba.ops.selective_scan`."""
    delta, z = expand_delta(delta, dt_weight), rows(z)
    initial = None if initial_state is None else initial_state.float().contiguous()
    arguments = (u, delta, A, B, C, D, delta_bias, path, grid, delta_softplus, in_step_order)
    scan = _Scan("forward", *arguments, gate=z, merge=merge)
    tile = _tile_plan("forward", scan, merge)
    if tile is not None:
        return cuda_tile.forward(scan, tile, z, initial, merge)
    last = scan.empty(scan.batch, scan.directions, scan.channels, scan.states)
    if scan.pair_directions(z):
        y, state = scan.empty(*u.shape[:2], scan.channels, dtype=u.dtype), initial
    else:
        y, (state, _) = scan.output(merge), scan.carries(initial)
    scan.run(scan.kernel, scan.arguments(y=y, state_in=state, last_state=last))
    return scan.merged(y, z) if scan.partial else y, last


def _backward(scan: _Scan, dy: Tensor, dlast: Tensor | None, initial: Tensor | None):
    """Return du, ddelta, dB, dC, dA, dD, dbias and the gradients of the initial state and of the gate."""
    state, adjoint = scan.carries(initial, dy, dlast)
    du = scan.output(merge=scan.u.dim() == 3)
    zero = not scan.rows_read
    ddelta = scan.empty(*scan.delta.shape, dtype=scan.delta.dtype, zero=zero)
    dBC = scan.empty(scan.batch, scan.directions, scan.tiles, scan.num_tokens, 2 * scan.states, zero=zero)
    parts = scan.batch * scan.chunks * scan.parameter_rows
    dparams = scan.empty(parts, scan.directions * scan.channels * (scan.states + 2))
    dstate = None if initial is None else torch.empty_like(initial)
    groups = scan.chunking[1] // scan.tiling.tile_steps
    held = scan.tiling.cpt * scan.tiling.spt * scan.tiling.checkpoints
    checkpoints = scan.empty(scan.blocks * scan.threads * groups * held)
    dz = None
    if scan.gate is not None:  # the ungated output that it takes is computed on the way
        shape = (scan.batch, scan.num_tokens, scan.directions, scan.channels)
        dtype = torch.float32 if scan.gate_is_shared else scan.gate.dtype
        dz = scan.empty(*shape, dtype=dtype, zero=not scan.visits.complete)
    arguments = scan.arguments(
        dy=dy, y=dz, du=du, state_in=state, adjoint_in=adjoint, ddelta=ddelta, dBC=dBC, dparams=dparams,
        dstate=dstate, checkpoints=checkpoints,
    )  # fmt: skip
    scan.run(scan.kernel, arguments)
    if scan.partial:
        du = scan.merged(du)
    if scan.gate is not None:
        dz = scan.merged(dz) if scan.gate_is_shared else dz.view(scan.gate.shape)
    return du, ddelta, *scan.projections(dBC, scan.tiles), *scan.parameters(dparams), dstate, dz


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    in_step_order,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s ten tensor arguments; None for absent ones."""
    low_rank, delta, dy, z = delta, expand_delta(delta, dt_weight), rows(dy), rows(z)
    initial, dlast = (None if x is None else x.float().contiguous() for x in (initial_state, dlast))
    arguments = (u, delta, A, B, C, D, delta_bias, path, grid, delta_softplus, in_step_order)
    scan = _Scan("backward", *arguments, gate=z, merge=u.dim() == 3, others=[dy])
    pairs = cuda_pair.plan(scan, dy) if z is None else None
    tile = _tile_plan("backward", scan, u.dim() == 3) if z is None and pairs is None else None
    dz = None
    if pairs is not None:
        du, ddelta, dB, dC, dA, dD, dbias, dstate = cuda_pair.backward(scan, pairs, dy, dlast, initial)
    elif tile is not None:
        du, ddelta, dB, dC, dA, dD, dbias, dstate = cuda_tile.backward(scan, tile, dy, dlast, initial)
    else:
        du, ddelta, dB, dC, dA, dD, dbias, dstate, dz = _backward(scan, dy, dlast, initial)
    ddt_weight = None
    if dt_weight is not None:
        ddelta, ddt_weight = expand_delta_backward(ddelta, low_rank, dt_weight)
    dD, dbias = None if D is None else dD, None if delta_bias is None else dbias
    return du, ddelta, dA, dB, dC, dD, dz, dbias, ddt_weight, dstate


def _supports(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
) -> str | None:
    if u.dtype not in ACT:
        return f"takes float32, float16 and bfloat16, not {str(u.dtype).removeprefix('torch.')}"
    if A.shape[2] > _MAX_STATES:
        return f"takes up to {_MAX_STATES} states a channel, not {A.shape[2]}"
    if any(x is not None and max(x.stride()[1:]) * x.element_size() > _INT32 for x in (u, delta, B, C, z)):
        return "takes strides up to 2^31 bytes between tokens"
    if 2 * u.shape[1] * A.shape[2] > _INT32 - 1024:  # the second stage of dB and dC counts them in 32 bits
        return f"takes up to 2^30 tokens times states, not {u.shape[1]} times {A.shape[2]}"
    if visits(path, tuple(grid)).repeats:
        return "takes paths whose directions visit a token at most once"
    return None


register_implementation(
    Implementation(
        "selective_scan",
        "cuda",
        ("cuda",),
        forward,
        backward,
        cuda_runtime.usable,
        _supports,
        (cuda_runtime.KernelError,),
    )
)
