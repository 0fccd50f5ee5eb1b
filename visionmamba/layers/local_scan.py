"""LocalMamba's scan: a list of directions of its own for each layer, windows among them, merged by attention.

A window direction needs a grid that windows tile, so tokens are padded with zeros at the bottom and right; each
direction visits its own padding only (see :mod:`visionmamba.ops.scan_path`), and it is cut off before the merge.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function

from .channel_attention import ChannelAttention
from .recompute import Enter
from .selective_ssm import SelectiveSSM

__all__ = ["LOCAL_DIRECTIONS", "LocalScan", "chosen_directions", "search_weights"]

LOCAL_DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
"""The directions that LocalMamba searches among, in the authors' order."""

_CLASS_TOKEN = "|cls"


def _padded(size: int, windows: list[int]) -> int:
    """Return the smallest size that holds ``size`` rounded up to each window."""
    padded = size
    for window in windows:
        padded = max(padded, (size + window - 1) // window * window)
    return padded


@torch.fx.wrap
@register_notrace_function
def pad_tokens(x: torch.Tensor, grid: list[int], windows: list[int], class_token: bool) -> torch.Tensor:
    """Pad raster tokens ``(B, L, C)`` of ``grid``, with a class token in their middle or without, for windows."""
    rows, columns = _padded(grid[0], windows), _padded(grid[1], windows)
    if rows == grid[0] and columns == grid[1]:
        return x
    middle = grid[0] * grid[1] // 2
    token = x[:, middle : middle + 1]
    if class_token:
        x = torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)
    x = x.reshape(x.shape[0], grid[0], grid[1], x.shape[2])
    x = F.pad(x, [0, 0, 0, columns - grid[1], 0, rows - grid[0]]).flatten(1, 2)
    if class_token:
        middle = rows * columns // 2
        x = torch.cat([x[:, :middle], token, x[:, middle:]], dim=1)
    return x


@torch.fx.wrap
@register_notrace_function
def crop_tokens(x: torch.Tensor, grid: list[int], windows: list[int], class_token: bool) -> torch.Tensor:
    """Undo :func:`pad_tokens` for ``(B, L, K, C)``."""
    rows, columns = _padded(grid[0], windows), _padded(grid[1], windows)
    if rows == grid[0] and columns == grid[1]:
        return x
    middle = rows * columns // 2
    token = x[:, middle : middle + 1]
    if class_token:
        x = torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)
    x = x.reshape(x.shape[0], rows, columns, x.shape[2], x.shape[3])[:, : grid[0], : grid[1]].flatten(1, 2)
    if class_token:
        middle = grid[0] * grid[1] // 2
        x = torch.cat([x[:, :middle], token, x[:, middle:]], dim=1)
    return x


@torch.fx.wrap
@register_notrace_function
def misplace_columns(x: torch.Tensor, grid: list[int], directions: list[int], class_token: bool) -> torch.Tensor:
    """Place the outputs of column directions where the authors' code does.

    It reads the sequence of columns, (width, height), back as if it were (height, width). On square grids that is
    right; on others the outputs of ``v`` and ``v_flip`` land on other tokens. The published models were trained on
    square grids, and are evaluated on others with this.

    Args:
        x: Outputs of each direction, ``(B, L, K, C)``.
        grid: (height, width).
        directions: The column directions among K.
        class_token: A class token is in the middle of the tokens; it stays there.
    """
    height, width = grid[0], grid[1]
    if height == width or len(directions) == 0:
        return x
    middle = height * width // 2
    parts: list[torch.Tensor] = []
    for k in range(x.shape[2]):
        part = x[:, :, k]
        if k in directions:
            token = part[:, middle : middle + 1]
            if class_token:
                part = torch.cat([part[:, :middle], part[:, middle + 1 :]], dim=1)
            sequence = part.reshape(x.shape[0], height, width, x.shape[3]).transpose(1, 2)  # as scanned
            part = sequence.reshape(x.shape[0], height, width, x.shape[3]).transpose(1, 2).flatten(1, 2)
            if class_token:
                part = torch.cat([part[:, :middle], token, part[:, middle:]], dim=1)
        parts.append(part)
    return torch.stack(parts, dim=2)


class AttentionMerge(nn.Module):
    """Sum the directions, each weighed by one channel attention that they share.

    Args:
        dim: Channels, D.
        num_directions: K.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, dim: int, num_directions: int, device=None, dtype=None) -> None:
        super().__init__()
        self.attention = ChannelAttention(dim, device=device, dtype=dtype)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Merge ``(B, L, K, D)`` to ``(B, L, D)``."""
        return (y * self.attention.gate(y, [1])).sum(2)


class SearchMerge(nn.Module):
    """Sum the normalised directions with one learned weight each, softmax over them: the supernet of the search.

    Args:
        dim: Channels, D.
        num_directions: K.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, dim: int, num_directions: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_directions, device=device, dtype=dtype))
        if not self.weights.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise almost evenly."""
        nn.init.normal_(self.weights, std=1e-3)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Merge ``(B, L, K, D)`` to ``(B, L, D)``."""
        y = F.layer_norm(y, [y.shape[3]])
        return torch.einsum("blkd,k->bld", y, self.weights.softmax(0).to(y.dtype))


class LocalScan(nn.Module):
    """State space models along a layer's own directions, merged by attention or by the search's weights.

    Args:
        d_inner: Channels, D.
        d_state: States a channel, N.
        dt_rank: Rank of the step size's projection, R.
        path: The directions, and ``|cls`` after them if a class token is in the middle of the tokens.
        d_conv: Taps of a causal convolution along each direction; 0 for none.
        search: Merge as the supernet of the direction search does.
        realign_columns: On grids that are not square, put the outputs of column directions on their own tokens. The
            official code does not, see :func:`misplace_columns`.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    windows: list[int]
    columns: list[int]

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        path: str,
        d_conv: int = 0,
        search: bool = False,
        realign_columns: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        directions = path.removesuffix(_CLASS_TOKEN).split(",")
        self.class_token = path.endswith(_CLASS_TOKEN)
        self.windows = sorted({int(size) for size in re.findall(r"w(\d+)", path)} | {1})
        self.columns = [k for k, name in enumerate(directions) if name.startswith("v") and not realign_columns]
        self.directions = SelectiveSSM(d_inner, d_state, dt_rank, path, d_conv, merge=False, **dd)
        self.merge = (SearchMerge if search else AttentionMerge)(d_inner, len(directions), **dd)

    def reset_parameters(self) -> None:
        """Initialise the state space models as Mamba does; see :meth:`SelectiveSSM.reset_parameters`."""
        self.directions.reset_parameters()

    def join(self, y: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Merge the directions' outputs over the padded grid, ``(B, L, K, D)``, to ``(B, L, D)``."""
        y = crop_tokens(y, grid, self.windows, self.class_token)
        return self.merge(misplace_columns(y, grid, self.columns, self.class_token))

    @torch.jit.unused
    def recomputed(
        self, tokens: torch.Tensor, enter: Enter, modules: Sequence[nn.Module], grid: list[int]
    ) -> torch.Tensor:
        """Do what :meth:`forward` does with what is made of tokens; see :meth:`SelectiveSSM.recomputed`."""

        def padded(tokens: torch.Tensor) -> list[torch.Tensor | None]:
            return [x if x is None else pad_tokens(x, grid, self.windows, self.class_token) for x in enter(tokens)]

        return self.join(self.directions.recomputed(tokens, padded, modules, grid), grid)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> torch.Tensor:
        """Scan tokens in raster order.

        Args:
            x: Tokens, ``(B, L, D)``; with a class token at index ``rows * columns // 2``, L counts it.
            z: Gate of each direction, ``(B, L, D)``, or None.
            grid: (rows, columns).

        Returns:
            ``(B, L, D)``.
        """
        x = pad_tokens(x, grid, self.windows, self.class_token)
        if z is not None:
            z = pad_tokens(z, grid, self.windows, self.class_token)
        return self.join(self.directions(x, z, grid), grid)


def search_weights(supernet: nn.Module) -> dict[str, dict[str, float]]:
    """Return how a direction search's supernet weighs the directions of its layers.

    Args:
        supernet: A model whose layers hold :class:`LocalScan` with ``search``.

    Returns:
        For each such layer, by its name in the model and from first to last, the softmax weight of each direction.

    Raises:
        ValueError: The model has no such layer, or weights that are not finite.
    """
    layers = {}
    for name, module in supernet.named_modules():
        if not (isinstance(module, LocalScan) and isinstance(module.merge, SearchMerge)):
            continue
        weights = module.merge.weights.detach().float().softmax(0)
        if not weights.isfinite().all():
            raise ValueError(f"supernet: expected finite weights of directions, got {weights.tolist()} in {name}")
        directions = module.directions.path.removesuffix(_CLASS_TOKEN).split(",")
        layers[name.removesuffix(".mixer.ssm")] = dict(zip(directions, weights.tolist(), strict=True))
    if not layers:
        raise ValueError(f"supernet: expected a model built with search=True, got {type(supernet).__name__} without")
    return layers


def chosen_directions(supernet: nn.Module, number: int = 4) -> list[str]:
    """Return what the ``directions`` argument of the searched model takes: each layer's heaviest directions.

    Args:
        supernet: A trained model of the direction search.
        number: Directions to choose for each layer; the published models have 4.

    Returns:
        A scan path for each layer, its directions in the authors' order (Huang et al. 2024, LocalMamba, section 4.2).

    Raises:
        ValueError: The model is no supernet, or has fewer directions.
    """
    if not 1 <= number <= len(LOCAL_DIRECTIONS):
        raise ValueError(f"number: expected 1 to {len(LOCAL_DIRECTIONS)} directions, got {number}")
    layers = search_weights(supernet).values()
    kept = [sorted(weights, key=weights.__getitem__, reverse=True)[:number] for weights in layers]
    return [",".join(sorted(names, key=LOCAL_DIRECTIONS.index)) for names in kept]
