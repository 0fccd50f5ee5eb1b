"""What the CUDA kernels of the scan share on the host: a call's tensors, strides, results and second stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .. import cuda_runtime
from ..cuda_runtime import Arguments, Launcher, pointer
from ..scan_path import scan_order, scan_path

__all__ = [
    "ACT",
    "Call",
    "Visits",
    "is_there_and_back",
    "merge_directions",
    "padded_order",
    "rows",
    "strides",
    "sum_rows",
    "visits",
]

ACT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The kernels' macro ACT."""


@dataclass(frozen=True)
class Visits:
    """Which tokens a path visits."""

    complete: bool  # every direction visits every token
    disjoint: bool  # no token is visited twice, by any direction
    covers: bool  # every token is visited by some direction
    repeats: bool  # a direction visits a token twice


@lru_cache(maxsize=512)
def visits(path: str, grid: tuple[int, ...]) -> Visits:
    table = scan_path(path, grid)
    counts = np.stack([np.bincount(row[row >= 0], minlength=table.num_tokens) for row in table.order])
    total = counts.sum(0)
    return Visits(
        bool((counts >= 1).all()), bool((total <= 1).all()), bool((total >= 1).all()), bool((counts > 1).any())
    )


@lru_cache(maxsize=512)
def is_there_and_back(path: str, grid: tuple[int, ...]) -> bool:
    """Whether a path is a direction and its reverse, over all tokens."""
    table = scan_path(path, grid)
    whole = table.num_directions == 2 and table.num_steps == table.num_tokens and visits(path, grid).complete
    return bool(whole and (table.order[0] == table.order[1][::-1]).all())


def rows(x: Tensor | None) -> Tensor | None:
    """Return ``x`` with a contiguous last dimension."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return strides along batch (elements), tokens (bytes) and directions (elements; 0 if they share the tensor)."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), x.stride(1) * x.element_size(), 0 if x.dim() == 3 else x.stride(2)


@lru_cache(maxsize=1024)
def padded_order(path: str, grid: tuple[int, ...], device: torch.device, steps: int) -> Tensor:
    """Return the path's index table with ``steps`` columns, -1 past its own.

    Args:
        path: Scan path.
        grid: Its grid.
        device: Where the table is needed.
        steps: Columns, at least the path's.
    """
    order = scan_order(path, grid, device)
    return torch.nn.functional.pad(order, (0, steps - order.shape[1]), value=-1)


def _vector(channels: int, states: int, channel_rows: list[Tensor | None], state_rows: list[Tensor]) -> int:
    """Return how many values of every row of activations can be read at a time: 4, 2 or 1."""
    rows = [x for x in channel_rows if x is not None]

    def aligned(x: Tensor, width: int) -> bool:
        return x.data_ptr() % (width * x.element_size()) == 0 and all(n % width == 0 for n in x.stride()[:-1])

    for width in (4, 2):
        read = rows + (state_rows if states % width == 0 else [])
        if channels % width == 0 and all(aligned(x, width) for x in read):
            return width
    return 1


def merge_directions(launcher: Launcher, partial: Tensor, dtype: torch.dtype, z: Tensor | None = None) -> Tensor:
    """Sum float32 parts over the directions, and multiply by silu(z).

    Args:
        launcher: The device.
        partial: ``(B, L, K, D)``, contiguous.
        dtype: The result's dtype, and that of ``z``.
        z: ``(B, L, D)``.

    Returns:
        ``(B, L, D)``.
    """
    batch, num_tokens, directions, channels = partial.shape
    y = torch.empty((batch, num_tokens, channels), dtype=dtype, device=partial.device)
    z_b, z_l = (0, 0) if z is None else z.stride()[:2]
    vec = _vector(channels, 0, [z], [])
    count = batch * num_tokens
    arguments = Arguments(
        (pointer(partial), pointer(z), pointer(y), count, z_b), (directions, channels, num_tokens, z_l)
    )
    blocks = -(-count * channels // (vec * 256))
    launcher.run("merge.cu", f"merge_directions_{vec}", {"ACT": ACT[dtype]}, blocks, 256, arguments)
    return y


def sum_rows(launcher: Launcher, partial: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> list[Tensor]:
    """Sum a float32 matrix over its rows, in a fixed order.

    Args:
        launcher: The device.
        partial: The matrix.
        dtype: Only chooses a compiled file.
        sizes: Columns of each result, three at most.

    Returns:
        The sums of the columns, cut into tensors of their own.
    """
    count, width = partial.shape
    results = [torch.empty(size, device=partial.device) for size in sizes]
    first, second, third = (*map(pointer, results), 0, 0)[:3]
    wide = (pointer(partial), first, second, third, count, width, sizes[0], sum(sizes[:2]))
    launcher.run("merge.cu", "reduce_rows", {"ACT": ACT[dtype]}, -(-width // 32), 256, Arguments(wide, ()))
    return results


class Call:
    """One call: shapes, contiguous rows, float32 parameters, and the results' allocation and second stages.

    Args:
        u, delta, A, B, C, D, delta_bias: As in ``selective_scan``, with ``delta`` expanded to the channels (then in
            float32).
        path: Scan path.
        grid: Its grid.
        delta_softplus: Apply softplus to the step sizes.
        in_step_order: Step t reads row t of ``delta``, ``B`` and ``C``.
        others: More activations that the kernels will read (``z`` or ``dy``).
    """

    def __init__(self, u, delta, A, B, C, D, delta_bias, path, grid, delta_softplus, in_step_order, others=()):
        self.batch, self.num_tokens = u.shape[:2]
        self.directions, self.channels, self.states = A.shape
        self.u, self.delta, self.B, self.C = (rows(x) for x in (u, delta, B, C))
        self.A, self.D, self.bias = (x if x is None else x.float().contiguous() for x in (A, D, delta_bias))
        self.path, self.grid = path, tuple(grid)
        self.order = scan_order(path, self.grid, u.device)
        self.num_steps = self.order.shape[1]
        self.visits = visits(path, self.grid)
        self.flags = {
            "DELTA_FLOAT": int(delta.dtype != u.dtype),
            "SOFTPLUS": int(delta_softplus),
            "STEP_ORDER": int(in_step_order),
        }
        self.launcher = cuda_runtime.launcher(u.device)
        self.widest = _vector(self.channels, self.states, [self.u, self.delta, *others], [self.B, self.C])
        self.vec = min(2, self.widest)

    @property
    def rows_read(self) -> bool:
        """Whether every row of ``delta``, ``B`` and ``C`` is read by some step, so that its gradient is written."""
        return self.num_steps == self.num_tokens and self.visits.complete

    @property
    def parameter_rows(self) -> int:
        """Rows of the parameters' gradients for a chunk: float32 ones come with what rounding took from them."""
        return 2 if self.u.dtype == torch.float32 else 1

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        allocate = torch.zeros if zero else torch.empty
        return allocate(shape, dtype=dtype, device=self.u.device)

    def needs_merge(self, merge: bool) -> bool:
        """Whether a result that the directions share is the sum of several parts."""
        return merge and self.directions > 1 and not self.visits.disjoint

    def output(self, merge: bool) -> Tensor:
        """Allocate a (B, L, D) or (B, L, K, D) result, or the float32 parts (B, L, K, D) of one to be merged."""
        tokens = (self.batch, self.num_tokens)
        if merge and not self.needs_merge(merge):
            return self.empty(*tokens, self.channels, dtype=self.u.dtype, zero=not self.visits.covers)
        dtype = torch.float32 if merge else self.u.dtype
        return self.empty(*tokens, self.directions, self.channels, dtype=dtype, zero=not self.visits.complete)

    def merged(self, partial: Tensor, z: Tensor | None = None) -> Tensor:
        """Sum (B, L, K, D) over the directions, and multiply by silu(z)."""
        return merge_directions(self.launcher, partial, self.u.dtype, z)

    def projections(self, partial: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
        """Sum the channel blocks' (B, K, tiles, L, 2N) to dB and dC, (B, L, K, N)."""
        shape = (self.batch, self.num_tokens, self.directions, self.states)
        dB, dC = (self.empty(*shape, dtype=self.u.dtype) for _ in range(2))
        if self.states == 1 and self.num_tokens > 256:  # enough of them for a thread each
            vec = next(vec for vec in (4, 2, 1) if self.directions % vec == 0)
            per_image = -(-self.num_tokens // 256)
            arguments = Arguments(
                tuple(map(pointer, (partial, dB, dC))), (self.directions, self.num_tokens, 1, tiles, per_image, 0)
            )
            self._merge_kernel(f"reduce_one_state_{vec}", self.batch * per_image, arguments)
            return dB, dC
        vec = 4 if self.states % 4 == 0 else 1
        per_plane = -(-self.num_tokens * 2 * self.states // (256 * vec))
        sizes = (self.directions, self.num_tokens, self.states, tiles, per_plane, 0)
        arguments = Arguments(tuple(map(pointer, (partial, dB, dC))), sizes)
        self._merge_kernel(f"reduce_projections_{vec}", self.batch * self.directions * per_plane, arguments)
        return dB, dC

    def parameters(self, partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the chunks' (B chunks parameter_rows, K D (N + 2)) to dA, dD and dbias."""
        shape = (self.directions, self.channels)
        split = self.directions * self.channels
        dA, dD, dbias = sum_rows(self.launcher, partial, self.u.dtype, (split * self.states, split, split))
        return dA.view(*shape, self.states), dD.view(shape), dbias.view(shape)

    def _merge_kernel(self, name: str, blocks: int, arguments: Arguments) -> None:
        self.launcher.run("merge.cu", name, {"ACT": ACT[self.u.dtype]}, blocks, 256, arguments)
