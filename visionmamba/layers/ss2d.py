"""SS2D, the 2-D selective scan token mixer of VMamba, and the state space models that it can hold.

Tokens are ``(B, H, W, C)`` from end to end. With E = ``ssm_ratio`` C channels inside (Liu et al. 2024, VMamba, figure
5)::

    x, z = in_proj(x)                      z only if gated
    x    = act(conv(x))                    depthwise, 3 x 3
    y    = sum over directions of scan_k(x)
    y    = out_norm(y) * act(z)
    out  = out_proj(y)
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops import selective_scan
from ..ops.ssd import ssd_scan
from .checks import check_choice
from .fusion import fuses, unwatched
from .norm import LayerNorm, before_linear
from .patch import DepthwiseConv2d
from .recompute import recomputed, recomputes
from .selective_ssm import SelectiveSSM

__all__ = ["CROSS_SCAN", "OUT_NORMS", "SS2D", "CascadeSSM", "MultiHeadSSM"]

CROSS_SCAN = "h,v,h_flip,v_flip"
"""VMamba's cross-scan: rows, columns, and both in reverse."""


class SpatialSoftmax(nn.Module):
    """Softmax over all positions of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, H, W, C)`` to the same shape."""
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


OUT_NORMS = {
    "layer": lambda dim, norm_layer, **dd: before_linear(norm_layer(dim, **dd)),
    "none": lambda dim, norm_layer, **dd: nn.Identity(),
    "dwconv": lambda dim, norm_layer, **dd: DepthwiseConv2d(dim, bias=False, **dd),
    "layer_dwconv": lambda dim, norm_layer, **dd: nn.Sequential(
        before_linear(norm_layer(dim, **dd)), DepthwiseConv2d(dim, bias=False, **dd)
    ),
    "softmax": lambda dim, norm_layer, **dd: SpatialSoftmax(),
    "sigmoid": lambda dim, norm_layer, **dd: nn.Sigmoid(),
}
"""What may follow the scan in place of its norm."""


class CascadeSSM(SelectiveSSM):
    """Two passes in place of the cross-scan: along each row by itself, then along each column by itself.

    Both passes are bidirectional, and a norm without parameters comes before each. The state starts anew at every line.

    Args:
        d_inner: Channels, D.
        d_state: States a channel, N.
        dt_rank: Rank of the step size's projection, R.
        realign: The official code adds the backward direction's output in the order of its steps, last token first.
            True turns it round, so that both directions' outputs of a token meet.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, d_inner: int, d_state: int = 16, dt_rank: int = 12, realign: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__(d_inner, d_state, dt_rank, path="h,h_flip,h,h_flip", device=device, dtype=dtype)
        self.realign = realign

    def scan_lines(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Scan lines ``(lines, length, D)`` both ways with the parameters of directions ``first`` and the next."""
        last = first + 2
        x = F.layer_norm(x, [self.d_inner]).to(x.dtype)
        weight = self.x_proj_weight[first:last].flatten(0, 1)
        projected = F.linear(x, weight).unflatten(-1, [2, self.dt_rank + 2 * self.d_state])
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -torch.exp(self.A_log[first:last].float())
        y, _ = selective_scan(
            x, dt.to(x.dtype), A, B.to(x.dtype), C.to(x.dtype), self.D[first:last], None,
            self.dt_proj_bias[first:last], self.dt_proj_weight[first:last], path="h,h_flip", merge=False,
        )  # fmt: skip
        forward, backward = y.unbind(2)
        return forward + (backward if self.realign else backward.flip(1))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> torch.Tensor:
        """Scan tokens ``(B, L, D)`` in raster order over ``grid``; ``z`` is not used."""
        rows, columns = grid[0], grid[1]
        batch, channels = x.shape[0], x.shape[2]
        x = self.scan_lines(x.reshape(batch * rows, columns, channels), 0)
        x = x.reshape(batch, rows, columns, channels).transpose(1, 2)
        x = self.scan_lines(x.reshape(batch * columns, rows, channels), 2)
        return x.reshape(batch, columns, rows, channels).transpose(1, 2).reshape(batch, rows * columns, channels)


class MultiHeadSSM(nn.Module):
    """K state space models of Mamba-2 over shared tokens: one decay and step size a head, B and C shared by the heads.

    Args:
        d_inner: Channels, D.
        d_state: States a channel, N.
        num_heads: Heads of each direction; they divide the channels.
        path: Scan path; its directions set K.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, d_inner: int, d_state: int = 64, num_heads: int = 6, path: str = CROSS_SCAN, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if d_inner % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the {d_inner} channels, got {num_heads}")
        self.d_inner, self.d_state, self.num_heads, self.path = d_inner, d_state, num_heads, path
        self.num_directions = directions = path.count(",") + 1
        self.x_proj_weight = nn.Parameter(torch.empty(directions, num_heads + 2 * d_state, d_inner, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(directions, num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(directions, num_heads, **dd))
        self.D = nn.Parameter(torch.empty(directions, num_heads, d_inner // num_heads, **dd))
        if not self.A_log.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as VMamba's Mamba-2 models: A = -1, small positive step sizes before softplus, D = 1."""
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_proj_bias, 0.0, 0.1)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> torch.Tensor:
        """Scan tokens ``(B, L, D)`` in raster order over ``grid``; ``z`` is not used."""
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, [self.num_directions, -1])
        dt, B, C = projected.split([self.num_heads, self.d_state, self.d_state], dim=-1)
        y, _ = ssd_scan(
            x.unflatten(-1, [self.num_heads, -1]), dt, -torch.exp(self.A_log.float()), B.unsqueeze(3), C.unsqueeze(3),
            self.D, dt_bias=self.dt_proj_bias, path=self.path, grid=grid,
        )  # fmt: skip
        return y.flatten(2)


class SS2D(nn.Module):
    """VMamba's token mixer.

    Args:
        dim: Channels, C.
        d_state: States a channel, N.
        ssm_ratio: Channels inside are ``int(ssm_ratio * dim)``.
        dt_rank: Rank of the step size's projection, or heads of each direction with ``ssm="multi_head"``;
            ``ceil(dim / 16)`` if absent.
        path: Scan path.
        ssm: ``"selective"`` (Mamba), ``"multi_head"`` (Mamba-2) or ``"cascade"`` (rows, then columns).
        ssm_init: ``"mamba"``, or VMamba's other ones: ``"normal"`` (its v1) and ``"uniform"`` (its v2).
        d_conv: Side of the depthwise convolution; below 2 for none.
        conv_bias: Whether that convolution has a bias.
        act_layer: Activation after the convolution, and of the gate.
        gate: ``"act"``: multiply by act(z); ``"linear"``: by z; ``"none"``.
        out_norm: One of :data:`OUT_NORMS`.
        out_act: Apply GELU after the norm.
        drop: Dropout on the output.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    keeps_little = False
    """Whether training computes anew what is around the scan: for families whose scan has ``recomputed``."""

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        path: str = CROSS_SCAN,
        ssm: str = "selective",
        ssm_init: str = "mamba",
        d_conv: int = 3,
        conv_bias: bool = True,
        act_layer=nn.SiLU,
        gate: str = "act",
        out_norm: str = "layer",
        out_act: bool = False,
        drop: float = 0.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_choice("gate", gate, ("act", "linear", "none"))
        check_choice("out_norm", out_norm, OUT_NORMS)
        check_choice("ssm", ssm, ("selective", "multi_head", "cascade"))
        check_choice("ssm_init", ssm_init, ("mamba", "normal", "uniform"))
        d_inner = int(ssm_ratio * dim)
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.gated, self.ssm_init = gate != "none", ssm_init
        self.in_proj = nn.Linear(dim, d_inner * (2 if self.gated else 1), bias=False, **dd)
        self.conv = DepthwiseConv2d(d_inner, d_conv, bias=conv_bias, **dd) if d_conv > 1 else nn.Identity()
        self.act = act_layer()
        self.gate_act = act_layer() if gate == "act" else nn.Identity()
        self.ssm = self.create_ssm(ssm, d_inner, d_state, dt_rank, path, **dd)
        self.out_norm = OUT_NORMS[out_norm](d_inner, norm_layer, **dd)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)
        self.drop = nn.Dropout(drop)
        if not self.in_proj.weight.is_meta:
            self.reset_parameters()

    def create_ssm(self, ssm: str, d_inner: int, d_state: int, dt_rank: int, path: str, **dd) -> nn.Module:
        """Return the state space model; families with their own override this."""
        if ssm == "cascade":
            return CascadeSSM(d_inner, d_state, dt_rank, **dd)
        return (MultiHeadSSM if ssm == "multi_head" else SelectiveSSM)(d_inner, d_state, dt_rank, path, **dd)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the state space model's parameters by ``ssm_init``."""
        self.ssm.reset_parameters()
        if self.ssm_init == "mamba":
            return
        fill = torch.randn_like if self.ssm_init == "normal" else torch.rand_like
        for name, parameter in self.ssm.named_parameters(recurse=False):
            if name in ("dt_proj_weight", "dt_proj_bias"):
                parameter.copy_(0.1 * fill(parameter))
            elif name == "A_log":
                parameter.copy_(torch.randn_like(parameter) if self.ssm_init == "normal" else 0 * parameter)

    def scan(self, x: torch.Tensor) -> torch.Tensor:
        """Scan ``(B, H, W, D)``; families with other scans override this."""
        batch, height, width, channels = x.shape
        y = self.ssm(x.reshape(batch, height * width, channels), None, [height, width])
        return y.reshape(batch, height, width, channels)

    @torch.jit.unused
    def _joins(self, x: torch.Tensor) -> bool:
        """Whether the activation is computed anew in backward, inside the scan's operator."""
        if type(self).scan is not SS2D.scan or type(self.ssm) is not SelectiveSSM or type(self.act) is not nn.SiLU:
            return False
        return torch.is_grad_enabled() and unwatched(self.act, self.ssm) and fuses(x)

    @torch.jit.unused
    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        return self.ssm.fused(x.flatten(1, 2), None, list(x.shape[1:3]), silu=True).unflatten(1, x.shape[1:3])

    def activate_and_scan(self, x: torch.Tensor) -> torch.Tensor:
        """Scan ``act(x)`` of ``(B, H, W, D)``."""
        if not torch.jit.is_scripting():
            if self._joins(x):
                return self._joined(x)
        return self.scan(self.act(x))

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map ``(B, H, W, C)`` to the scan's input, ``(B, L, D)``."""
        weight = self.in_proj.weight[: self.out_proj.in_features] if self.gated else self.in_proj.weight
        x = F.linear(x, weight)
        return self.act(self.conv(x)).flatten(1, 2), None

    def leave(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """Map the scan's output, ``(B, H, W, D)``, to ``(B, H, W, C)``; the gate is made of the layer's input."""
        y = self.out_act(self.out_norm(y))
        if self.gated:
            y = y * self.gate_act(F.linear(x, self.in_proj.weight[self.out_proj.in_features :]))
        return self.out_proj(y)

    @torch.jit.unused
    def _recomputes(self, x: torch.Tensor) -> bool:
        """Whether the layer keeps its input and the scan's output alone, and computes the rest anew in backward."""
        if not self.keeps_little or not recomputes(x, *self.children()):
            return False
        return all(type(layer) is nn.Linear and layer.bias is None for layer in (self.in_proj, self.out_proj))

    @torch.jit.unused
    def _recomputed(self, x: torch.Tensor) -> torch.Tensor:
        size, around = list(x.shape[1:3]), [self.in_proj, self.out_norm, self.out_proj]
        y = self.ssm.recomputed(x, self.enter, [self.in_proj, self.conv], size).unflatten(1, size)
        if self.gated:
            return recomputed(self.leave, around, y, x)
        return recomputed(lambda y: self.leave(y, None), around[1:], y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix ``(B, H, W, C)``."""
        if not torch.jit.is_scripting():
            if self._recomputes(x):
                return self.drop(self._recomputed(x))
        x = self.in_proj(x)
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            y = self.out_act(self.out_norm(self.activate_and_scan(self.conv(x)))) * self.gate_act(z)
        else:
            y = self.out_act(self.out_norm(self.activate_and_scan(self.conv(x))))
        return self.drop(self.out_proj(y))
