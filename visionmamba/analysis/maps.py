"""What a model looks at: effective receptive fields, activations, class activation, and which tokens a scan connects.

All functions take a model in evaluation mode and a batch of one image ``(1, C, H, W)`` as it reads it, and give maps as
arrays; :mod:`visionmamba.analysis.pictures` draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from ..ops.scan_path import scan_path

__all__ = [
    "ImageGrid", "ScanCall", "activation_maps", "effective_receptive_field", "grad_cam", "image_grid", "scan_calls",
    "scan_reach",
]  # fmt: skip

_CLASS_TOKEN = "|cls"


def _last_map(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the deepest feature map, ``(1, C, H, W)``."""
    return model.forward_intermediates(x, indices=1, intermediates_only=True)[-1]


def effective_receptive_field(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """Return how strongly each pixel moves the features at the centre (Luo et al. 2016, arXiv:1701.04128).

    Args:
        model: A model with ``forward_intermediates``.
        x: Image, ``(1, C, H, W)``.

    Returns:
        ``(H, W)``: absolute gradient of the centre's summed features, summed over the colours; its largest is 1.
    """
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        features = _last_map(model, x)
        centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(F.relu(centre).sum(), x)
    return _scaled(gradient[0].abs().sum(0))


def activation_maps(model: nn.Module, x: torch.Tensor, levels: int = 4) -> dict[str, np.ndarray]:
    """Return the size of the features at each place, after stages or evenly spaced blocks.

    Args:
        model: A model with ``forward_intermediates``.
        x: Image, ``(1, C, H, W)``.
        levels: Number of maps at most.

    Returns:
        ``(H', W')`` by module: the features' norm over channels, from 0 to 1.
    """
    available = len(model.feature_info)
    indices = sorted({round(i) for i in np.linspace(0, available - 1, min(levels, available))})
    with torch.no_grad():
        features = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    names = [model.feature_info[index]["module"] for index in indices]
    return {
        name: _scaled(level[0].float().norm(dim=0), shift=True) for name, level in zip(names, features, strict=True)
    }


def _scaled(values: torch.Tensor, shift: bool = False) -> np.ndarray:
    array = values.detach().float().cpu().numpy()
    array = array - array.min() if shift else array
    return array / max(float(array.max()), 1e-12)


def _default_layer(model: nn.Module) -> str:
    """Return the last stage, or of a model of equal blocks the last but one: only the class token leaves the last."""
    last = model.feature_info[-1]
    before = model.feature_info[-2] if len(model.feature_info) > 1 else last
    return (before if before["reduction"] == last["reduction"] else last)["module"]


def _as_map(tokens: torch.Tensor, model: nn.Module, grid: tuple[int, int]) -> torch.Tensor:
    """Return a layer's output as ``(C, H, W)``, whatever its layout."""
    if tokens.dim() == 4:
        return (tokens.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else tokens)[0]
    tokens, prefix = tokens[0], getattr(model, "num_prefix_tokens", None)
    number = grid[0] * grid[1]
    if len(tokens) == number + 1 and prefix is None:  # a class token in the middle
        tokens = torch.cat([tokens[: number // 2], tokens[number // 2 + 1 :]])
    elif len(tokens) > number:
        tokens = tokens[len(tokens) - number :]
    if len(tokens) != number:
        raise ValueError(f"layer: its output of {len(tokens)} tokens is not a map of {grid[0]} x {grid[1]}")
    return tokens.T.unflatten(1, grid)


def grad_cam(
    model: nn.Module, x: torch.Tensor, target: int | None = None, layer: str | None = None
) -> tuple[np.ndarray, int]:
    """Return where the evidence for a class is (Grad-CAM, Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2).

    Args:
        model: A classifier with ``feature_info``.
        x: Image, ``(1, C, H, W)``.
        target: The class; the model's first answer if absent.
        layer: Name of the module whose output is weighed; the last stage, or the last but one of equal blocks.

    Returns:
        ``(H', W')`` from 0 to 1, and the class.

    Raises:
        ValueError: There is no such class or layer, or the layer has no map.
    """
    name = layer or _default_layer(model)
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"layer: no module {name!r} in the model; feature levels are {_levels(model)}")
    outputs: list[torch.Tensor] = []
    hooked = [modules[name], *(modules[f"{name}.{part}"] for part in ("mixer",) if f"{name}.{part}" in modules)]
    hooks = [module.register_forward_hook(lambda _module, _inputs, out: outputs.append(out)) for module in hooked]
    try:
        with torch.enable_grad():
            logits = model(x.detach().clone().requires_grad_())
            if target is not None and not 0 <= target < logits.shape[-1]:
                raise ValueError(f"class: expected 0 to {logits.shape[-1] - 1}, got {target}")
            target = int(logits.argmax()) if target is None else target
            tensors = [out for out in outputs if isinstance(out, torch.Tensor)]
            if not tensors:
                raise ValueError(f"layer: {name!r} gives no tensor; feature levels are {_levels(model)}")
            (gradient,) = torch.autograd.grad(logits[0, target], tensors[-1])
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        grid = tuple(_grid_of(model, x, name))
        activation, weight = (_as_map(value, model, grid) for value in (tensors[-1], gradient))
        cam = F.relu((weight.mean((1, 2), keepdim=True) * activation).sum(0))
    return _scaled(cam), target


def _levels(model: nn.Module) -> str:
    return ", ".join(level["module"] for level in model.feature_info)


def _grid_of(model: nn.Module, x: torch.Tensor, name: str) -> torch.Size:
    names = [level["module"] for level in model.feature_info]
    index = next((i for i, level in enumerate(names) if name == level or name.startswith(f"{level}.")), len(names) - 1)
    return model.forward_intermediates(x, indices=[index], intermediates_only=True)[0].shape[-2:]


@dataclass(frozen=True)
class ScanCall:
    """One selective scan of a forward pass, with the numbers of its first image.

    Args:
        layer: Name of the module that called it.
        path: Scan path.
        grid: Size of the token grid.
        delta: Step sizes after softplus, ``(L, K, D)``.
        A: ``(K, D, N)``.
        B: ``(L, K, N)``.
        C: ``(L, K, N)``.
        in_step_order: Row t of delta, B and C belongs to step t of every direction instead of token t.
    """

    layer: str
    path: str
    grid: tuple[int, ...]
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    in_step_order: bool


class _ScanRecorder(TorchDispatchMode):
    def __init__(self, keep: Callable[..., None]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.visionmamba.selective_scan.default:
            self.keep(*args)
        return func(*args, **(kwargs or {}))


def scan_calls(model: nn.Module, x: torch.Tensor) -> list[ScanCall]:
    """Run a model and return its selective scans, in order.

    Args:
        model: Any model; one without selective scans has none.
        x: Input; only the first image counts.
    """
    calls: list[ScanCall] = []

    def keep(
        u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, softplus, merge, in_step_order
    ) -> None:
        step = delta[0].float()
        if dt_weight is not None:
            step = torch.einsum("lkr,kdr->lkd", step, dt_weight.float())
        step = step if delta_bias is None else step + delta_bias.float()
        layer = max(tracker.parents, key=len, default="").partition(".")[2]
        projections = (F.softplus(step) if softplus else step, A.float(), B[0].float(), C[0].float())
        calls.append(ScanCall(layer, path, tuple(grid), *projections, in_step_order))

    tracker = ModuleTracker()
    with torch.no_grad(), tracker, _ScanRecorder(keep):
        model(x)
    return calls


@dataclass(frozen=True)
class ImageGrid:
    """Where the tokens of a scan are in an image.

    Args:
        size: Rows and columns of the image's tokens.
        memory: Rows and columns of the tokens in memory, with padding at the bottom and right.
        class_token: A class token is in the middle of the tokens.
    """

    size: tuple[int, int]
    memory: tuple[int, int]
    class_token: bool

    @property
    def _middle(self) -> int:
        return self.memory[0] * self.memory[1] // 2

    def token(self, row: int, column: int) -> int:
        """Return the index of the token at a place.

        Raises:
            ValueError: The place is outside the image.
        """
        if not (0 <= row < self.size[0] and 0 <= column < self.size[1]):
            raise ValueError(f"token: expected a place within {self.size[0]} x {self.size[1]}, got {row}, {column}")
        token = row * self.memory[1] + column
        return token + (self.class_token and token >= self._middle)

    def as_map(self, values: np.ndarray) -> np.ndarray:
        """Return values of tokens, ``(..., L)``, as maps ``(..., H, W)``."""
        if self.class_token:
            values = np.delete(values, self._middle, axis=-1)
        return values.reshape(*values.shape[:-1], *self.memory)[..., : self.size[0], : self.size[1]]


def image_grid(call: ScanCall, model: nn.Module, x: torch.Tensor) -> ImageGrid:
    """Return where a scan's tokens are in the image.

    Args:
        call: One of :func:`scan_calls`.
        model: The model.
        x: Its input.

    Raises:
        ValueError: The scan does not run over an image.
    """
    if len(call.grid) == 2:
        return ImageGrid(call.grid, scan_path(call.path, call.grid).grid, call.path.endswith(_CLASS_TOKEN))
    height, width = _last_map(model, x).shape[-2:]  # a model of equal blocks that scans a sequence
    extra = call.grid[0] - height * width
    if len(call.grid) == 1 and extra in (0, 1):
        return ImageGrid((height, width), (height, width), extra == 1)
    raise ValueError(f"token: the scan {call.layer} runs over {call.grid}, not over an image")


def scan_reach(call: ScanCall, token: int, decay_only: bool = False) -> np.ndarray:
    """Return how much of each token's input arrives in one token's output, for each direction.

    Unrolled, ``y_i = sum_j sum_n C_in exp(A_n (delta_j+1 + ... + delta_i)) delta_j B_jn u_j`` over the steps j up to i:
    for each channel a causal attention map without a softmax (Ali et al. 2024, arXiv:2403.01590, equation 13).

    Args:
        call: A scan.
        token: The token that reads.
        decay_only: Only what the steps between leave of the state, ``exp(A (delta_j+1 + ... + delta_i))``: from 1 at
            the token itself down to 0.

    Returns:
        ``(K, L)``: the mean over channels of the weight's size, of the decay with the mean over states; 0 for tokens
        that come later or that the direction never visits.
    """
    path = scan_path(call.path, call.grid)
    reach = np.zeros((path.num_directions, path.num_tokens), dtype=np.float32)
    for k in range(path.num_directions):
        last = path.inverse[k, token]
        if last < 0:
            continue
        tokens = torch.as_tensor(path.order[k, : last + 1].astype(np.int64), device=call.A.device)
        visited = tokens >= 0
        rows = torch.arange(len(tokens), device=tokens.device) if call.in_step_order else tokens.clamp(min=0)
        delta = call.delta[rows, k]  # (steps, D)
        elapsed = delta.flip(0).cumsum(0).flip(0) - delta  # delta_j+1 + ... + delta_i
        decay = torch.exp(elapsed.unsqueeze(-1) * call.A[k])  # (steps, D, N)
        if decay_only:
            weight = decay.mean((1, 2))
        else:
            weights = call.C[rows[-1], k] * call.B[rows, k]  # (steps, N)
            weight = (torch.einsum("sdn,sn->sd", decay, weights) * delta).abs().mean(1)
        reach[k, tokens[visited].cpu().numpy()] = weight[visited].cpu().numpy()
    return reach
