"""The selective state space model that all families share: one set of parameters for each direction of a scan path.

Glossary: B batch, L tokens, K directions, D channels (``d_inner``), N ``d_state``, R ``dt_rank``, W ``d_conv``.

Every family projects tokens to ``D`` channels, runs this layer along its own path, gates, and projects back. Tokens
stay in raster order from end to end. With x the layer's input (Gu & Dao 2023, Mamba, algorithm 2)::

    u_k           = silu(conv_k(x)) along direction k            if d_conv, else x        (B, L, [K,] D)
    dt_k, B_k, C_k = x_proj_k u_k                                                         (B, L, K, R + 2N)
    Delta_k       = softplus(dt_proj_k dt_k + dt_bias_k)                                  (B, L, K, D)
    y_k           = scan along direction k of exp(Delta_k A_k), Delta_k B_k u_k, C_k, + D_k u_k
    y             = (sum_k y_k) silu(z)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops import causal_conv1d, selective_scan
from ..ops.ssm import selective_ssm
from .fusion import fuses
from .recompute import Enter, ScanInputs, recomputed_scan

__all__ = ["SelectiveSSM", "init_dt_bias_", "init_s4d_real_"]


@torch.no_grad()
def init_s4d_real_(A_log: torch.Tensor) -> torch.Tensor:
    """Fill ``A_log`` (..., N) with log(1 .. N), so that A = -exp(A_log) is S4D-Real (Gu et al. 2022, S4D, eq. 9)."""
    states = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(states.log().expand_as(A_log))


@torch.no_grad()
def init_dt_bias_(bias: torch.Tensor, dt_min: float = 1e-3, dt_max: float = 1e-1, floor: float = 1e-4) -> torch.Tensor:
    """Fill ``bias`` so that softplus(bias) is log-uniform in [dt_min, dt_max] (Gu & Dao 2023, Mamba, section 3.6).

    Args:
        bias: Tensor to fill, of any shape.
        dt_min: Smallest step size.
        dt_max: Largest step size.
        floor: Step sizes are clamped from below to this.

    Returns:
        ``bias``.
    """
    log_dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
    dt = log_dt.exp().clamp(min=floor)
    return bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


class SelectiveSSM(nn.Module):
    """K selective state space models over shared tokens, one along each direction of a scan path.

    Args:
        d_inner: Channels, D.
        d_state: States a channel, N.
        dt_rank: Rank of the step size's projection, R.
        path: Scan path; its directions set K. See :mod:`visionmamba.ops.scan_path`.
        d_conv: Taps of a causal depthwise convolution with SiLU along each direction; 0 for none.
        conv_bias: Whether that convolution has a bias.
        merge: Sum the directions' outputs.
        shared: One set of parameters for all directions instead of one for each.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int = 12,
        path: str = "h",
        d_conv: int = 0,
        conv_bias: bool = True,
        merge: bool = True,
        shared: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank, self.d_conv = d_inner, d_state, dt_rank, d_conv
        self.path, self.merge = path, merge
        self.num_directions = path.count(",") + 1
        self.shared = shared
        self.in_step_order = False  # which row of delta, B and C a step reads: see selective_scan
        directions = 1 if shared else self.num_directions  # sets of parameters
        self.conv_weight = nn.Parameter(torch.empty(directions, d_inner, d_conv, **dd)) if d_conv else None
        self.conv_bias = nn.Parameter(torch.empty(directions, d_inner, **dd)) if d_conv and conv_bias else None
        self.x_proj_weight = nn.Parameter(torch.empty(directions, dt_rank + 2 * d_state, d_inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(directions, d_inner, dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(directions, d_inner, **dd))
        self.A_log = nn.Parameter(torch.empty(directions, d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(directions, d_inner, **dd))
        if not self.A_log.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Mamba does: S4D-Real, log-uniform step sizes, D = 1, PyTorch's defaults elsewhere."""
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -(self.d_conv**-0.5), self.d_conv**-0.5)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -(self.d_conv**-0.5), self.d_conv**-0.5)
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_proj_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_dt_bias_(self.dt_proj_bias)
        init_s4d_real_(self.A_log)
        nn.init.ones_(self.D)

    def each(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter for each direction, ``(K, ...)``: a view, also where the directions share one set."""
        return parameter.expand([self.num_directions] + [-1] * (parameter.dim() - 1)) if self.shared else parameter

    def project(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project the scan's input to its low-rank step sizes, B and C.

        Args:
            u: ``(B, L, D)`` shared by the directions or, after the convolution, ``(B, L, K, D)``.

        Returns:
            ``dt`` ``(B, L, K, R)``, ``B`` and ``C`` ``(B, L, K, N)``.
        """
        if self.conv_weight is None:
            projected = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (self.x_proj_weight.shape[0], -1))
            projected = projected.expand(-1, -1, self.num_directions, -1)
        elif self.shared or self.num_directions == 1:
            projected = F.linear(u, self.x_proj_weight[0])
        else:
            projected = torch.einsum("blkd,kcd->blkc", u, self.x_proj_weight)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return dt, B, C

    def scan_inputs(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> ScanInputs:
        """Return the scan's tensor arguments, from ``u`` to ``dt_weight``; for the arguments see :meth:`forward`."""
        if self.conv_weight is not None:
            bias = None if self.conv_bias is None else self.each(self.conv_bias)
            x, _ = causal_conv1d(x, self.each(self.conv_weight), bias, path=self.path, grid=grid)
        dt, B, C = self.project(x)
        A = self.each(-torch.exp(self.A_log.float()))
        return x, dt, A, B, C, self.each(self.D), z, self.each(self.dt_proj_bias), self.each(self.dt_proj_weight)

    @torch.jit.unused
    def recomputed(
        self, tokens: torch.Tensor, enter: Enter, modules: Sequence[nn.Module], grid: list[int]
    ) -> torch.Tensor:
        """Do what :meth:`forward` does with what is made of tokens, and make that anew in backward.

        Args:
            tokens: What is kept.
            enter: Maps it to x and z.
            modules: What holds the parameters that ``enter`` reads.
            grid: Size of the token grid.
        """
        options = (self.path, list(grid), True, self.merge, self.in_step_order)
        return recomputed_scan(lambda t: self.scan_inputs(*enter(t), grid), options, [self, *modules], tokens)

    @torch.jit.unused
    def fused(
        self,
        x: torch.Tensor,
        z: torch.Tensor | None,
        grid: list[int],
        in_proj_weight: torch.Tensor | None = None,
        silu: bool = False,
    ) -> torch.Tensor:
        """Do what :meth:`forward` does in one operator.

        Args:
            x: Tokens.
            z: Gate, or None.
            grid: Size of the token grid.
            in_proj_weight: Where x and the gate are still to be projected: the weight, see :func:`selective_ssm`.
            silu: Apply SiLU to the tokens, which no convolution follows here.
        """
        parameters = (
            self.conv_weight, self.conv_bias, self.x_proj_weight, -torch.exp(self.A_log.float()), self.D,
            self.dt_proj_bias, self.dt_proj_weight,
        )  # fmt: skip
        parameters = [None if parameter is None else self.each(parameter) for parameter in parameters]
        silu = silu or self.conv_weight is not None
        return selective_ssm(x, z, in_proj_weight, *parameters, self.path, grid, self.merge, silu)

    def scan(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> torch.Tensor:
        """Do what :meth:`forward` does by the separate operators."""
        u, dt, A, B, C, D, z, dt_bias, dt_weight = self.scan_inputs(x, z, grid)
        y, _ = selective_scan(
            u, dt, A, B, C, D, z, dt_bias, dt_weight, path=self.path, grid=grid, merge=self.merge,
            projections_in_step_order=self.in_step_order,
        )  # fmt: skip
        return y

    def forward(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> torch.Tensor:
        """Scan tokens in raster order.

        Args:
            x: Tokens, ``(B, L, D)``.
            z: Gate, ``(B, L, D)``, or None.
            grid: Size of the token grid.

        Returns:
            ``(B, L, D)``, or ``(B, L, K, D)`` without ``merge``.
        """
        if not torch.jit.is_scripting():
            if type(self) is SelectiveSSM and fuses(x):
                return self.fused(x, z, grid)
        return self.scan(x, z, grid)

    def extra_repr(self) -> str:
        """Name the sizes and the path in ``repr``."""
        return (
            f"{self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}, d_conv={self.d_conv}, path={self.path!r}"
        )
