"""Pictures of scan paths: in which order a model visits the tokens of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.nn as nn

from .._files import replacing
from ..ops.scan_path import ScanPath, scan_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_paths", "layers_by_path", "side_by_side", "write_figure"]

_CLASS_TOKEN = "|cls"
_PANEL = 2.2  # inches
_MAX_NUMBERED = 8  # columns of tokens in a panel; numbers of more would be too small to read beside the line
_COLORS = "viridis"


def layers_by_path(model: nn.Module) -> dict[str, list[str]]:
    """Return the scan paths of a model and, for each, the names of the blocks that walk it, in order.

    Args:
        model: A model of the zoo.
    """
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        path = getattr(module, "path", None)
        if isinstance(path, str) and hasattr(module, "num_directions"):
            parts = name.split(".")
            last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
            layers.setdefault(path, []).append(".".join(parts[: last_number + 1]))
    return layers


def _extent(grid: tuple[int, ...]) -> tuple[int, int]:
    """Return the columns and rows of a panel: frames lie side by side, a sequence is one row."""
    frames, rows, columns = (1, 1, *grid)[-3:]
    return frames * (columns + 1) - 1, rows


def _places(path: ScanPath, k: int) -> np.ndarray:
    """Return the (x, y) at which each step of direction ``k`` is drawn."""
    coordinates = path.coordinates(k)
    padded = np.zeros((len(coordinates), 3), dtype=int)
    padded[:, 3 - coordinates.shape[1] :] = coordinates
    frame, row, column = padded.T
    return np.stack([frame * (path.grid[-1] + 1) + column, row], axis=-1)


def _draw_direction(axes: Axes, path: ScanPath, k: int, grid: tuple[int, ...], title: str) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    columns, rows = _extent(path.grid)
    places = _places(path, k)
    steps = np.full((rows, columns), np.nan)
    steps[places[:, 1], places[:, 0]] = np.arange(len(places))
    background = np.ones((rows, columns))  # tokens that this direction does not visit are grey
    background[:, path.grid[-1] :: path.grid[-1] + 1] = np.nan  # between frames
    axes.imshow(background, cmap="Greys", vmin=0, vmax=5)
    image = axes.imshow(steps, cmap=_COLORS, vmin=0, vmax=max(1, len(places) - 1))
    axes.plot(*places.T, color="white", linewidth=0.9, path_effects=[withStroke(linewidth=1.6, foreground="0.3")])
    for place, marker in ((places[0], "o"), (places[-1], "X")):
        axes.plot(*place, marker=marker, markersize=6, markerfacecolor="red", markeredgecolor="white", linestyle="none")
    if columns <= _MAX_NUMBERED:
        size = min(8.0, 20 * _panel_width(path.grid) / columns)  # points
        for step, (x, y) in enumerate(places):
            light = np.dot(image.to_rgba(step)[:3], (0.299, 0.587, 0.114)) > 0.5
            label = {"ha": "left", "va": "top", "fontsize": size, "color": "black" if light else "white"}
            axes.text(x - 0.44, y - 0.42, str(step + 1), **label)  # in the corner: the line goes through the middle
    if path.grid != grid and len(grid) == 2:  # what is outside is padding
        real = Rectangle((-0.5, -0.5), grid[1], grid[0], fill=False, edgecolor="red", linestyle="--", clip_on=False)
        axes.add_patch(real)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _directions(name: str) -> list[str]:
    return name.removesuffix(_CLASS_TOKEN).split(",")


def _panel_width(grid: tuple[int, ...]) -> float:
    columns, rows = _extent(grid)
    return _PANEL * min(3.0, max(1.0, columns / rows / 2))


def _figure(columns: int, rows: int, grid: tuple[int, ...]) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    across, down = _extent(grid)
    width = _panel_width(grid)
    height = min(2 * _PANEL, max(0.3, width * down / across))
    figure = Figure(figsize=(width * columns + 0.4, (height + 0.3) * rows + 0.2), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _label(name: str, label: str) -> str:
    return f"{label}\n+ class token in the middle" if name.endswith(_CLASS_TOKEN) else label


def draw_paths(paths: Mapping[str, str], grid: Sequence[int]) -> Figure:
    """Draw paths one below the other, with a panel for each direction.

    Args:
        paths: Path names by label, such as the layers that walk them.
        grid: Size of the token grid, slowest axis first.

    Returns:
        A matplotlib figure. Tokens are coloured by step, and numbered where there are few; a path runs from the red
        dot to the red cross; grey tokens are not visited.

    Raises:
        ValueError: A path is unknown or does not fit the grid.
    """
    grid = tuple(grid)
    drawn = {label: scan_path(name.removesuffix(_CLASS_TOKEN), grid) for label, name in paths.items()}
    width = max(path.num_directions for path in drawn.values())
    figure, panels = _figure(width, len(drawn), grid)
    for row, (label, path) in zip(panels, drawn.items(), strict=True):
        for k, direction in enumerate(_directions(path.name)):
            _draw_direction(row[k], path, k, grid, direction)
        row[0].set_ylabel(_label(paths[label], label), fontsize=8)
        for empty in row[path.num_directions :]:
            empty.set_axis_off()
    return figure


def side_by_side(paths: Mapping[str, Sequence[str]], grid: Sequence[int], limit: int | None = None) -> Figure:
    """Draw the directions of several models, a column for each.

    Args:
        paths: For each title, the paths that a model's layers walk; a direction is drawn once.
        grid: Size of the token grid, slowest axis first.
        limit: Largest number of directions to draw of a model; all if absent.

    Returns:
        A matplotlib figure, as :func:`draw_paths`.

    Raises:
        ValueError: A path is unknown or does not fit the grid.
    """
    grid = tuple(grid)
    directions = {
        title: list(dict.fromkeys(direction for name in names for direction in _directions(name)))
        for title, names in paths.items()
    }
    limit = limit or max(map(len, directions.values()))
    height = min(limit, max(map(len, directions.values())))
    figure, panels = _figure(len(directions), height, grid)
    for column, (title, names) in zip(panels.T, directions.items(), strict=True):
        for panel, direction in zip(column, names, strict=False):
            _draw_direction(panel, scan_path(direction, grid), 0, grid, direction)
        column[0].set_title(f"{title}\n{names[0]}", fontsize=8)
        if len(names) > limit:
            column[-1].set_xlabel(f"and {len(names) - limit} more", fontsize=8)
        for empty in column[len(names) :]:
            empty.set_axis_off()
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the suffix chooses the format.

    Raises:
        ValueError: The format is unknown.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)
