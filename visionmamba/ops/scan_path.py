"""ScanPath: the order in which a scan visits the tokens of a grid.

Tokens stay in raster order in memory. A *direction* names one order over a grid, a *path* is a list of directions, and
the scan kernels walk the resulting index table. A new scan order is therefore a new function registered here, never a
new kernel::

    path = scan_path("h,v,h_flip,v_flip", (14, 14))   # VMamba's cross-scan
    path.order                                        # (4, 196) token index visited at each step

Directions (any of them may end in ``_flip``: the whole sequence reversed):

=================  ===================================================================================================
``h``              raster order; works on grids of any rank (``h`` over ``(L,)`` is a plain sequence)
``v``              column by column
``snake_h``        boustrophedon along rows: right, one down, left, one down, ... (PlainMamba)
``snake_v``        the same along columns
``wK``             K x K windows in row-major order, row-major inside; the grid is padded to multiples of K (LocalMamba)
``sub_SYX``        the sub-grid of every S-th row from Y and every S-th column from X, row-major (EfficientVMamba)
``subT_SYX``       the same, column-major
axis letters       axes from slowest to fastest, e.g. ``hw`` (= ``h``), ``wh`` (= ``v``), ``thw``, ``twh``, ``wht``
=================  ===================================================================================================

A path may end in ``|cls``: a class token sits at index ``L // 2`` of the tokens, and every direction visits it at step
``L // 2``, whatever its own order is (LocalMamba's middle class token).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from ._scratch import scratch

__all__ = [
    "ScanPath",
    "direction_rows",
    "gather_steps",
    "padded_grid",
    "register_direction",
    "scan_order",
    "scan_path",
    "scan_rows",
    "scatter_steps_",
    "steps_to_tokens",
    "visited_steps",
]

Grid = tuple[int, ...]
Order = Callable[..., np.ndarray]
Multiple = Callable[..., int]

_directions: list[tuple[re.Pattern[str], Order, Multiple]] = []
_FLIP = "_flip"
_CLASS_TOKEN = "|cls"


@dataclass(frozen=True)
class ScanPath:
    """K orders over the tokens of one grid.

    Args:
        name: The path's name, as parsed.
        grid: Size of the token grid in memory (rows, columns, or any rank). It is at least the grid that was asked
            for: window and sub-grid directions pad it at the end of each axis, and padding tokens are ordinary tokens.
        order: ``(K, P)`` int32. ``order[k, t]`` is the token that direction k visits at step t; -1 marks steps
            without a token, at the end of directions that are shorter than the longest.
        num_tokens: Tokens in memory: the product of ``grid``, plus one with a class token.
    """

    name: str
    grid: Grid
    order: np.ndarray
    num_tokens: int

    @property
    def num_directions(self) -> int:
        """K."""
        return self.order.shape[0]

    @property
    def num_steps(self) -> int:
        """P, the length of the longest direction."""
        return self.order.shape[1]

    @cached_property
    def inverse(self) -> np.ndarray:
        """``(K, num_tokens)`` int32: the step at which direction k visits a token; -1 where it never does."""
        inverse = np.full((self.num_directions, self.num_tokens), -1, dtype=np.int32)
        for k, order in enumerate(self.order):
            visited = order >= 0
            inverse[k, order[visited]] = np.flatnonzero(visited)
        return inverse

    @cached_property
    def has_gaps(self) -> bool:
        """Whether some direction has steps without a token."""
        return bool((self.order < 0).any())

    def coordinates(self, k: int) -> np.ndarray:
        """Return the ``(steps, rank)`` grid coordinates that direction ``k`` visits, for drawing."""
        order = self.order[k]
        return np.stack(np.unravel_index(order[order >= 0], self.grid), axis=-1)


def register_direction(pattern: str, multiple: Multiple = lambda *groups: 1) -> Callable[[Order], Order]:
    """Register a scan direction.

    Args:
        pattern: Regular expression that the whole direction name (without ``_flip``) matches. Its groups are passed on
            as strings.
        multiple: ``(*groups)`` to the number that each side of the grid is padded to a multiple of.

    Returns:
        A decorator for ``function(grid, memory_grid, *groups) -> order``: token indices into ``memory_grid``, whose
        raster order is the order of the steps.
    """

    def decorator(function: Order) -> Order:
        _directions.append((re.compile(pattern), function, multiple))
        _cached_path.cache_clear()
        return function

    return decorator


def _raster(memory_grid: Grid) -> np.ndarray:
    return np.arange(int(np.prod(memory_grid)), dtype=np.int32).reshape(memory_grid)


def _cropped(grid: Grid, memory_grid: Grid) -> np.ndarray:
    """Token indices of the real grid inside the padded one."""
    return _raster(memory_grid)[tuple(slice(size) for size in grid)]


def _require_2d(grid: Grid, name: str) -> None:
    if len(grid) != 2:
        raise ValueError(f"grid: direction {name!r} expects (rows, columns), got {grid}")


def _ceil_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _find(direction: str) -> tuple[Order, int, tuple[str, ...]]:
    """Return a direction's function, what it pads to a multiple of, and what its name says."""
    base = direction.removesuffix(_FLIP)
    for pattern, function, multiple in _directions:
        match = pattern.fullmatch(base)
        if match:
            return function, multiple(*match.groups()), match.groups()
    raise ValueError(
        f"path: unknown direction {direction!r}; known are h, v, snake_h, snake_v, wK (e.g. w7), sub_SYX, subT_SYX "
        "(e.g. sub_210), axis orders (e.g. thw, wht), each also with _flip"
    )


def padded_grid(name: str, grid: Grid) -> Grid:
    """Return the grid that tokens must have in memory for a path.

    Args:
        name: Path name, see the module's description.
        grid: Size of the real token grid.

    Returns:
        The smallest grid that holds the padding of every direction of the path (each pads on its own: a token may be
        padding to one direction and not exist for another).
    """
    sizes = list(grid)
    for direction in name.removesuffix(_CLASS_TOKEN).split(","):
        _, multiple, _ = _find(direction)
        sizes = [max(size, _ceil_to(real, multiple)) for size, real in zip(sizes, grid, strict=True)]
    return tuple(sizes)


def scan_path(name: str, grid: tuple[int, ...]) -> ScanPath:
    """Build (or take from the cache) the path of a name over a grid.

    Args:
        name: Comma-separated directions, optionally followed by ``|cls``; see the module's description.
        grid: Size of the token grid, slowest axis first.

    Returns:
        The path.

    Raises:
        ValueError: A direction is unknown or does not fit the grid's rank, or a size is not positive.
    """
    return _cached_path(name, tuple(int(size) for size in grid))


@lru_cache(maxsize=512)
def _cached_path(name: str, grid: Grid) -> ScanPath:
    if not grid or min(grid) < 1:
        raise ValueError(f"grid: expected positive sizes, got {grid}")
    memory_grid = padded_grid(name, grid)
    num_tokens = int(np.prod(memory_grid))
    orders = []
    for direction in name.removesuffix(_CLASS_TOKEN).split(","):
        function, _, groups = _find(direction)
        order = np.asarray(function(grid, memory_grid, *groups), dtype=np.int32).ravel()
        orders.append(order[::-1] if direction.endswith(_FLIP) else order)
    if name.endswith(_CLASS_TOKEN):
        middle = num_tokens // 2
        orders = [np.insert(order + (order >= middle), len(order) // 2, middle) for order in orders]
        num_tokens += 1
    steps = max(map(len, orders))
    table = np.full((len(orders), steps), -1, dtype=np.int32)
    for row, order in zip(table, orders, strict=True):
        row[: len(order)] = order
    table.setflags(write=False)
    return ScanPath(name, memory_grid, table, num_tokens)


@lru_cache(maxsize=1024)
def _cached_order(name: str, grid: Grid, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # the table outlives the caller's mode
        return torch.tensor(scan_path(name, grid).order, device=device)


def scan_order(name: str, grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return a path's ``(K, P)`` int32 index table on a device, from a cache.

    Args:
        name: Path name.
        grid: Size of the token grid.
        device: Where the table is needed.

    Returns:
        The table; shared between callers, not to be written.
    """
    return _cached_order(name, tuple(int(size) for size in grid), device)


@lru_cache(maxsize=1024)
def _cached_rows(name: str, grid: Grid, device: torch.device, per_direction: bool) -> torch.Tensor:
    rows = np.maximum(scan_path(name, grid).order, 0).astype(np.int64)
    if per_direction:
        rows = rows * len(rows) + np.arange(len(rows))[:, None]
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


def scan_rows(name: str, grid: tuple[int, ...], device: torch.device, per_direction: bool = False) -> torch.Tensor:
    """Return a path's table as rows to gather, from a cache.

    Args:
        name: Path name.
        grid: Size of the token grid.
        device: Where the table is needed.
        per_direction: Rows of ``(B, L, K, C)`` with L and K flattened; otherwise of ``(B, L, C)``.

    Returns:
        ``(K, P)`` int64, direction k's row of token 0 where there is no token; not to be written.
    """
    return _cached_rows(name, tuple(int(size) for size in grid), device, per_direction)


def direction_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return which rows of ``x``, with L and K flattened, hold the tokens ``index``.

    Args:
        x: ``(B, L, C)``, the same for all directions, or ``(B, L, K, C)``.
        index: Tokens, ``(K, T)`` int64.

    Returns:
        ``(K, T)`` rows for :func:`gather_steps`.
    """
    if x.dim() == 3:
        return index
    return index * x.shape[2] + torch.arange(x.shape[2], device=x.device).unsqueeze(1)


def gather_steps(
    x: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype | None = None, buffer: str | None = None
) -> torch.Tensor:
    """Take rows of tokens in the order of a path's steps.

    Args:
        x: ``(B, L, C)``, the same for all directions, or ``(B, L, K, C)``.
        rows: ``(K, T)`` int64 rows of ``x`` with L and K flattened, from :func:`scan_rows` or :func:`direction_rows`.
        dtype: Of the result; that of ``x`` by default.
        buffer: Scratch buffer to take them into.

    Returns:
        ``(B, K, T, C)``: a new tensor, or the scratch buffer.
    """
    if x.dim() == 4:
        x = x.flatten(1, 2)
    if buffer is None or dtype not in (None, x.dtype):
        return x.index_select(1, rows.flatten()).unflatten(1, rows.shape).to(dtype or x.dtype)
    out = scratch(buffer, (x.shape[0], rows.numel(), x.shape[2]), x.device, x.dtype)
    return torch.index_select(x, 1, rows.flatten(), out=out).unflatten(1, rows.shape)


def visited_steps(name: str, grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """Return what to multiply steps with so that those without a token become 0.

    Args:
        name: Path name.
        grid: Size of the token grid.
        device: Where the factors are needed.
        dtype: Their dtype.

    Returns:
        ``(K, P, 1)`` of zeros and ones; None for a path on which every step visits a token.
    """
    grid = tuple(int(size) for size in grid)
    if not scan_path(name, grid).has_gaps:
        return None
    return (scan_order(name, grid, device) >= 0).unsqueeze(-1).to(dtype)


@lru_cache(maxsize=1024)
def _cached_token_rows(name: str, grid: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rows (L, K) of (K P) that hold each token, and where there is none (L, K, 1), or None."""
    path = scan_path(name, grid)
    rows = np.maximum(path.inverse, 0).astype(np.int64) + path.num_steps * np.arange(path.num_directions)[:, None]
    missing = (path.inverse < 0).T[:, :, None]
    with torch.inference_mode(False):
        mask = torch.tensor(missing, device=device) if missing.any() else None
        return torch.tensor(np.ascontiguousarray(rows.T), device=device), mask


def steps_to_tokens(values: torch.Tensor, name: str, grid: tuple[int, ...], buffer: str | None = None) -> torch.Tensor:
    """Bring values from path order to the tokens' order, with 0 where a direction does not visit a token.

    Args:
        values: ``(B, K, P, C)``.
        name: Path name.
        grid: Size of the token grid.
        buffer: Scratch buffer to bring them into.

    Returns:
        ``(B, L, K, C)``: a new tensor, or the scratch buffer.
    """
    rows, missing = _cached_token_rows(name, tuple(int(size) for size in grid), values.device)
    shape = (values.shape[0], rows.numel(), values.shape[3])
    out = None if buffer is None else scratch(buffer, shape, values.device, values.dtype)
    tokens = torch.index_select(values.flatten(1, 2), 1, rows.flatten(), out=out).unflatten(1, rows.shape)
    return tokens if missing is None else tokens.masked_fill_(missing, 0.0)


def scatter_steps_(out: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add rows in the order of a path's steps to tokens, in place: the adjoint of :func:`gather_steps`.

    Args:
        out: ``(B, L, C)``, where directions add up, or ``(B, L, K, C)``.
        index: Row of each step, ``(K, T)`` int64.
        values: ``(B, K, T, C)``.
    """
    for k in range(index.shape[0]):
        target = out if out.dim() == 3 else out[:, :, k]
        target.index_add_(1, index[k], values[:, k])


@register_direction("h")
def _rows(grid: Grid, memory_grid: Grid) -> np.ndarray:
    return _cropped(grid, memory_grid)


@register_direction("v")
def _columns(grid: Grid, memory_grid: Grid) -> np.ndarray:
    _require_2d(grid, "v")
    return _cropped(grid, memory_grid).T


@register_direction("snake_([hv])")
def _snake(grid: Grid, memory_grid: Grid, axis: str) -> np.ndarray:
    _require_2d(grid, f"snake_{axis}")
    tokens = _cropped(grid, memory_grid)
    lines = (tokens if axis == "h" else tokens.T).copy()
    lines[1::2] = lines[1::2, ::-1]
    return lines


@register_direction(r"w([1-9]\d*)", multiple=int)
def _windows(grid: Grid, memory_grid: Grid, window: str) -> np.ndarray:
    _require_2d(grid, f"w{window}")
    size = int(window)
    rows, columns = (_ceil_to(side, size) for side in grid)
    tokens = _raster(memory_grid)[:rows, :columns]
    return tokens.reshape(rows // size, size, columns // size, size).swapaxes(1, 2)


@register_direction(r"sub(T?)_([1-9])(\d)(\d)", multiple=lambda _transposed, stride, _row, _column: int(stride))
def _sub_grid(grid: Grid, memory_grid: Grid, transposed: str, stride: str, row: str, column: str) -> np.ndarray:
    _require_2d(grid, "sub_SYX")
    step = int(stride)
    if max(int(row), int(column)) >= step:
        raise ValueError(f"path: sub_SYX expects Y and X below S, got S = {stride}, Y = {row}, X = {column}")
    rows, columns = (_ceil_to(side, step) for side in grid)
    tokens = _raster(memory_grid)[int(row) : rows : step, int(column) : columns : step]
    return tokens.T if transposed else tokens


@register_direction("(hw|wh|thw|twh|htw|hwt|wth|wht)")
def _axis_order(grid: Grid, memory_grid: Grid, axes: str) -> np.ndarray:
    if len(axes) != len(grid):
        raise ValueError(f"grid: direction {axes!r} expects {len(axes)} axes, got {grid}")
    letters = "thw"[-len(grid) :]
    return _cropped(grid, memory_grid).transpose([letters.index(axis) for axis in axes])
