"""S4 and S4D: linear state space layers that do not depend on time, as a convolution and as a recurrence.

One system h' = A h + B u, y = Re(C h) + D u for each of H channels, discretised with the channel's step size. Training
convolves with the kernel K_l = Re(C A_bar^l B_bar) by FFT; decoding steps h_t = A_bar h_{t-1} + B_bar u_t. Both are the
same function. S6 (Mamba) gives up the convolution to let Delta, B and C depend on the input.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..inference import InferenceParams, cached_states
from ..packed import apply_to_sequences, sequence_index
from .discretize import discretize
from .hippo import nplr

__all__ = ["S4", "S4D", "S4DMixer", "causal_convolution"]


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel with its kernel by FFT.

    Args:
        u: ``(B, L, H)``.
        kernel: ``(H, L)``.

    Returns:
        ``(B, L, H)``.
    """
    length = u.shape[1]
    spectrum = torch.fft.rfft(u.mT.float(), n=2 * length) * torch.fft.rfft(kernel.float(), n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT.to(u.dtype)


class _StateSpaceLayer(nn.Module):
    """What S4 and S4D share: step sizes, skip, the two modes."""

    def __init__(self, d_model: int, d_state: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.d_model, self.d_state = d_model, d_state
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt._no_weight_decay = True

    def kernel(self, length: int) -> Tensor:
        """Return the convolution kernel, ``(H, length)``."""
        raise NotImplementedError

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A_bar``, ``B_bar`` and ``C`` of the recurrence."""
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        """Run over a sequence from a zero state, as a convolution.

        Args:
            u: ``(B, L, H)``.

        Returns:
            ``(B, L, H)``.
        """
        return causal_convolution(u, self.kernel(u.shape[1])) + self.D * u

    def initial_state(self, batch: int) -> Tensor:
        """Return a zero state, ``(B, H, N)`` complex."""
        return torch.zeros(batch, self.d_model, self.d_state, dtype=torch.complex64, device=self.D.device)

    def recurrent(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over a sequence step by step.

        Args:
            u: ``(B, L, H)``.
            state: ``(B, H, N)``; zero if absent.

        Returns:
            ``(B, L, H)`` and the state after the last step.
        """
        state = self.initial_state(u.shape[0]) if state is None else state
        system = self.discrete()
        outputs = []
        for u_t in u.unbind(1):
            y, state = self._advance(u_t, state, *system)
            outputs.append(y)
        return torch.stack(outputs, dim=1), state

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one step.

        Args:
            u: ``(B, H)``.
            state: ``(B, H, N)``.

        Returns:
            ``(B, H)`` and the new state.
        """
        return self._advance(u, state, *self.discrete())

    def _advance(self, u: Tensor, state: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        moved = A * state if A.dim() == 2 else torch.einsum("hnm,bhm->bhn", A, state)
        state = moved + B * u.unsqueeze(-1)
        return (C * state).sum(-1).real.to(u.dtype) + self.D * u, state


_S4D_INITS = ("legs", "lin", "inv", "real")


def _s4d_eigenvalues(init: str, d_state: int) -> Tensor:
    """Eigenvalues with non-negative imaginary part, one of each conjugate pair, ``(N,)`` complex."""
    n = torch.arange(d_state, dtype=torch.float64)
    if init == "lin":
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    if init == "inv":
        size = 2 * d_state
        return torch.complex(torch.full_like(n, -0.5), size / math.pi * (size / (2 * n + 1) - 1))
    if init == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if init == "legs":
        return nplr("legs", 2 * d_state)[0][d_state:]
    raise ValueError(f"init: expected one of {', '.join(_S4D_INITS)}, got {init!r}")


class S4D(_StateSpaceLayer):
    """S4D: a diagonal state matrix.

    Args:
        d_model: Channels, H.
        d_state: Complex states a channel; each stands for a conjugate pair.
        init: ``"legs"`` (HiPPO's eigenvalues), ``"lin"``, ``"inv"`` or ``"real"``.
        method: Discretisation, see :func:`discretize`.
        dt_min: Smallest step size at initialisation.
        dt_max: Largest step size at initialisation.

    Source:
        Gu et al. 2022, "On the parameterization and initialization of diagonal state space models".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        init: str = "lin",
        method: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__(d_model, d_state, dt_min, dt_max)
        self.method = method
        eigenvalues = _s4d_eigenvalues(init, d_state).to(torch.complex64).repeat(d_model, 1)
        self.log_A_real = nn.Parameter(torch.log(-eigenvalues.real))
        self.A_imag = nn.Parameter(eigenvalues.imag)
        self.log_A_real._no_weight_decay = self.A_imag._no_weight_decay = True
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) * math.sqrt(0.5))

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A_bar``, ``B_bar`` and ``C``, ``(H, N)`` each; C counts both of each pair."""
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        A_bar, B_bar = discretize(A, torch.ones_like(A), self.log_dt.exp(), self.method)
        return A_bar, B_bar, 2 * torch.view_as_complex(self.C)

    def kernel(self, length: int) -> Tensor:
        """Return the convolution kernel, ``(H, length)``: a Vandermonde product."""
        A_bar, B_bar, C = self.discrete()
        powers = torch.exp(torch.log(A_bar).unsqueeze(-1) * torch.arange(length, device=A_bar.device))
        return torch.einsum("hn,hnl->hl", C * B_bar, powers).real


class S4(_StateSpaceLayer):
    """S4: a state matrix that is normal plus low rank, with HiPPO's memory.

    Args:
        d_model: Channels, H.
        d_state: States a channel, N.
        measure: HiPPO measure of the initialisation: ``"legs"``, ``"legt"`` or ``"fout"``.
        dt_min: Smallest step size at initialisation.
        dt_max: Largest step size at initialisation.

    Source:
        Gu et al. 2021, "Efficiently modeling long sequences with structured state spaces", algorithm 1; bilinear
        discretisation.
    """

    def __init__(
        self, d_model: int, d_state: int = 64, measure: str = "legs", dt_min: float = 0.001, dt_max: float = 0.1
    ) -> None:
        super().__init__(d_model, d_state, dt_min, dt_max)
        eigenvalues, P, B, _ = (part.to(torch.complex64) for part in nplr(measure, d_state))
        self.A_real = nn.Parameter(eigenvalues.real.repeat(d_model, 1))
        self.A_imag = nn.Parameter(eigenvalues.imag.repeat(d_model, 1))
        self.P = nn.Parameter(torch.view_as_real(P.repeat(d_model, 1, 1)))
        self.B = nn.Parameter(torch.view_as_real(B.repeat(d_model, 1)))
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) * math.sqrt(0.5 / d_state))
        for parameter in (self.A_real, self.A_imag, self.P, self.B):
            parameter._no_weight_decay = True

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lambda (H, N), P (H, N, rank), B (H, N), C (H, N)."""
        P, B, C = (torch.view_as_complex(parameter) for parameter in (self.P, self.B, self.C))
        return torch.complex(self.A_real.clamp(max=0), self.A_imag), P, B, C

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A_bar`` ``(H, N, N)``, ``B_bar`` and ``C`` ``(H, N)``."""
        eigenvalues, P, B, C = self._continuous()
        A = torch.diag_embed(eigenvalues) - P @ P.mH
        return (*discretize(A, B, self.log_dt.exp(), "bilinear"), C)

    def kernel(self, length: int) -> Tensor:
        """Return the convolution kernel, ``(H, length)``, from its generating function at the roots of unity.

        K(z) = C (I - A_bar^L z^L) (I - A_bar z)^-1 B_bar, and with the bilinear A_bar
        (I - A_bar z)^-1 B_bar = ((1 - z) / dt - (1 + z) / 2 A)^-1 B. A is diagonal plus low rank, so this is Cauchy
        products and a small inverse (Woodbury).
        """
        eigenvalues, P, B, C = self._continuous()
        A_bar, _, _ = self.discrete()
        # The roots are moved inside the circle, to radius exp(-1 / L): an eigenvalue of 0 has its pole at z = 1
        C = C - math.exp(-1) * torch.einsum("hn,hnm->hm", C, torch.linalg.matrix_power(A_bar, length))
        index = torch.arange(length, device=B.device, dtype=torch.float64)
        z = torch.polar(torch.full_like(index, math.exp(-1 / length)), -2 * math.pi * index / length)
        node, half = (1 - z).to(C.dtype), ((1 + z) / 2).to(C.dtype)
        dt = self.log_dt.exp()[:, None]
        resolvent = 1 / (node / dt.unsqueeze(-1) - half * eigenvalues.unsqueeze(-1))  # (H, N, L)
        left = torch.cat([C.unsqueeze(1), P.mH], dim=1)  # (H, 1 + rank, N)
        right = torch.cat([B.unsqueeze(2), P], dim=2)  # (H, N, 1 + rank)
        products = torch.einsum("hin,hnl,hnj->hlij", left, resolvent, right)
        corner, row, column, core = (
            products[..., 0, 0], products[..., :1, 1:], products[..., 1:, :1], products[..., 1:, 1:],
        )  # fmt: skip
        identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        scaled = half[:, None, None]
        correction = (row @ torch.linalg.solve(identity + scaled * core, scaled * column)).squeeze(-1).squeeze(-1)
        return torch.fft.ifft(corner - correction, n=length).real * torch.exp(index / length).float()


class S4DMixer(nn.Module):
    """A layer of a language model that does not depend on time: project, S4D, GELU, project.

    The counterpart of :class:`visionmamba.language.Mamba` without selection, for comparisons.

    Args:
        d_model: Width of the input and output.
        d_state: Complex states a channel.
        expand: Channels of the S4D layer are ``expand * d_model``.
        init: See :class:`S4D`.
        layer_idx: The layer's place in the inference cache.
        device: Where to create the parameters.
        dtype: Kept for compatibility with the other mixers; the parameters are float32.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 8,
        expand: int = 4,
        init: str = "lin",
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(d_model, expand * d_model, device=device)
        self.ssm = S4D(expand * d_model, d_state, init).to(device)
        self.out_proj = nn.Linear(expand * d_model, d_model, device=device)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: InferenceParams | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run over a sequence, or continue one; the arguments are those of :class:`visionmamba.language.Mamba`."""
        seq_idx = sequence_index(cu_seqlens, seq_idx, hidden_states)
        u = self.in_proj(hidden_states)
        if inference_params is not None:
            (cache,) = cached_states(self, inference_params, u.shape[0])
            state = torch.view_as_complex(cache) if inference_params.seqlen_offset > 0 else None
            y, state = self.ssm.recurrent(u, state)
            cache.copy_(torch.view_as_real(state))
        elif seq_idx is not None:
            y = apply_to_sequences(self.ssm, u, seq_idx)
        else:
            y = self.ssm(u)
        return self.out_proj(F.gelu(y))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **_kwargs) -> Tensor:
        """Return a zero state, ``(B, H, N, 2)``."""
        return torch.view_as_real(self.ssm.initial_state(batch_size))
