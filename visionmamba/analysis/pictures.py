"""Pictures of what models look at on a user's image, several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn

from ..inference import class_names
from .maps import activation_maps, effective_receptive_field, grad_cam, image_grid, scan_calls, scan_reach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["KINDS", "Subject", "draw"]

_PANEL = 2.4  # inches
_CLASS_TOKEN = "|cls"
_SMALLEST = 1e-4  # on a logarithmic scale
_SHIFTED = "from the panel's smallest value to its largest"


@dataclass(frozen=True)
class Subject:
    """A model and an image as it reads it.

    Args:
        name: The model's name.
        model: The model, in evaluation mode.
        x: ``(1, C, H, W)``.
    """

    name: str
    model: nn.Module
    x: torch.Tensor

    @property
    def picture(self) -> np.ndarray:
        """The image as it was before the model's normalisation, ``(H, W, 3)`` from 0 to 1."""
        cfg = self.model.pretrained_cfg
        mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (self.x[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class _Panel:
    title: str
    overlay: np.ndarray | None  # from 0 or more to 1
    picture: np.ndarray | None = None
    mark: tuple[float, float] | None = None
    logarithmic: bool = False


def _cam(subject: Subject, options: dict[str, Any]) -> list[_Panel]:
    cam, target = grad_cam(subject.model, subject.x, options.get("target"), options.get("layer"))
    label = class_names(subject.model)[target].split(",")[0]
    return [_Panel("image", None, subject.picture), _Panel(f"class {target}: {label}", cam, subject.picture)]


def _activation(subject: Subject, options: dict[str, Any]) -> list[_Panel]:
    maps = activation_maps(subject.model, subject.x)
    return [_Panel("image", None, subject.picture)] + [
        _Panel(name, activation, subject.picture) for name, activation in maps.items()
    ]


def _receptive_field(subject: Subject, options: dict[str, Any]) -> list[_Panel]:
    field = effective_receptive_field(subject.model, subject.x)
    share = float((np.sort(field.ravel())[::-1].cumsum() < 0.5 * field.sum()).mean())
    panel = _Panel(f"half of the gradient in {share:.1%} of the pixels", field, logarithmic=True)
    return [_Panel("image", None, subject.picture), panel]


def _scan(subject: Subject, options: dict[str, Any]) -> list[_Panel]:
    calls = scan_calls(subject.model, subject.x)
    if not calls:
        raise ValueError(f"{subject.name} has no selective scan to draw")
    index = options.get("scan")
    index = len(calls) // 2 if index is None else index
    if not -len(calls) <= index < len(calls):
        raise ValueError(f"scan: {subject.name} has {len(calls)} scans, got {index}")
    call = calls[index]
    with torch.no_grad():
        grid = image_grid(call, subject.model, subject.x)
    row, column = options.get("token") or tuple(size // 2 for size in grid.size)
    reach = grid.as_map(scan_reach(call, grid.token(row, column), options.get("decay_only", False)))
    height, width = subject.picture.shape[:2]
    mark = ((column + 0.5) * width / grid.size[1] - 0.5, (row + 0.5) * height / grid.size[0] - 0.5)
    names, maps = [*call.path.removesuffix(_CLASS_TOKEN).split(","), "all directions"], [*reach, reach.sum(0)]
    return [_Panel(call.layer, None, subject.picture, mark)] + [
        _Panel(name, values / max(values.max(), 1e-12), None, mark, not options.get("decay_only", False))
        for name, values in zip(names, maps, strict=True)
    ]


KINDS: dict[str, Callable[[Subject, dict[str, Any]], list[_Panel]]] = {
    "gradcam": _cam,
    "activation": _activation,
    "erf": _receptive_field,
    "scan": _scan,
}
"""Kinds of pictures by name."""

_TITLES = {
    "gradcam": "Grad-CAM",
    "activation": "Size of the features",
    "erf": "Effective receptive field of the centre",
    "scan": "How much of each token reaches the marked one",
}


def _show(axes: Any, panel: _Panel, shape: tuple[int, int]) -> Any:
    """Draw a panel, a map over a picture without colours of its own; return the map's image, if there is one."""
    extent, image = (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5), None
    if panel.picture is not None:
        plain = panel.overlay is None
        axes.imshow(panel.picture if plain else panel.picture.mean(-1), extent=extent, cmap="gray", vmin=0, vmax=1)
    if panel.overlay is not None:
        values = np.log10(np.maximum(panel.overlay, _SMALLEST)) if panel.logarithmic else panel.overlay
        smooth = {} if panel.picture is None else {"alpha": 0.6, "interpolation": "bilinear"}
        limits = {"vmin": np.log10(_SMALLEST), "vmax": 0} if panel.logarithmic else {"vmin": 0, "vmax": 1}
        image = axes.imshow(values, extent=extent, cmap="viridis", **smooth, **limits)
    if panel.mark is not None:
        for size, color in ((7, "black"), (5, "white")):  # to be seen on any picture
            axes.plot(*panel.mark, marker="s", markersize=size, markerfacecolor="none", markeredgecolor=color)
    axes.set_title(panel.title, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def _colour_bar(figure: Figure, axes: np.ndarray, image: Any, label: str, logarithmic: bool) -> None:
    bar = figure.colorbar(image, ax=list(axes.flat), location="bottom", fraction=0.04, shrink=0.6, aspect=40)
    bar.set_label(label, fontsize=7)
    if logarithmic:
        ticks = np.arange(round(np.log10(_SMALLEST)), 1)
        bar.set_ticks(ticks, labels=[f"{'≤ ' if tick == ticks[0] else ''}{10.0**tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7)


def draw(kind: str, subjects: Sequence[Subject], **options: Any) -> Figure:
    """Draw one kind of picture for several models, a row for each.

    Args:
        kind: One of :data:`KINDS`.
        subjects: Models and images.
        **options: ``target`` and ``layer`` of :func:`visionmamba.analysis.maps.grad_cam`; ``token`` (row, column),
            ``scan`` (which of the model's scans) and ``decay_only`` of :func:`visionmamba.analysis.maps.scan_reach`.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: The kind, or an option, does not fit the model.
    """
    from matplotlib.figure import Figure

    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rows = [KINDS[kind](subject, options) for subject in subjects]
    columns = max(map(len, rows))
    figure = Figure(figsize=(_PANEL * columns, (_PANEL + 0.2) * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    images = []
    for axes, panels, subject in zip(grid, rows, subjects, strict=True):
        for place, panel in zip(axes, panels, strict=False):
            images.append(_show(place, panel, subject.picture.shape[:2]))
        for empty in axes[len(panels) :]:
            empty.set_axis_off()
        axes[0].set_ylabel(subject.name, fontsize=8)
    logarithmic = any(panel.logarithmic for panels in rows for panel in panels)
    label = _SHIFTED if kind == "activation" else "share of the panel's largest value"
    _colour_bar(figure, grid, next(image for image in images if image is not None), label, logarithmic)
    figure.suptitle(_TITLES[kind], fontsize=10)
    return figure
