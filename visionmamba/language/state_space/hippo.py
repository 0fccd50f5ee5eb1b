"""HiPPO: memories that keep a signal's past as coefficients of orthogonal polynomials (Gu et al. 2020).

At time t, c_n(t) is the inner product of the past with a basis function g_n under a measure:

========  ====================================  ==================================================================
LegS      uniform on [0, t]                     g_n(x) = sqrt(2n + 1) P_n(2x / t - 1);  c' = (A c + B u) / t
LegT      uniform on [t - theta, t]             g_n(x) = sqrt(2n + 1) P_n(2(x - t) / theta + 1);  c' = A c + B u
FouT      uniform on [t - theta, t]             1, sqrt(2) cos(2 pi m s), sqrt(2) sin(2 pi m s) with s = (t - x) / theta
========  ====================================  ==================================================================

with P_n the Legendre polynomials. Differentiating c_n gives the matrices below. In LegT and FouT the value that leaves
the window, u(t - theta), is read off the memory itself.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .discretize import discretize

__all__ = ["HiPPO", "hippo_matrices", "nplr"]

MEASURES = ("legs", "legt", "fout")


def _check(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")


def hippo_matrices(measure: str, d_state: int, theta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a measure's A ``(N, N)`` and B ``(N,)`` in float64.

    Args:
        measure: ``"legs"``, ``"legt"`` or ``"fout"``.
        d_state: Number of coefficients, N; an odd one keeps FouT's cosines and sines in pairs.
        theta: Length of the window of ``legt`` and ``fout``.

    Raises:
        ValueError: The measure is unknown.

    Source:
        Gu et al. 2020, "HiPPO", theorems 1 and 2; Gu et al. 2022, "How to train your HiPPO" (FouT).
    """
    _check(measure)
    n = torch.arange(d_state, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    row, column = n.unsqueeze(1), n.unsqueeze(0)
    if measure == "legs":
        A = -torch.where(row > column, root.unsqueeze(1) * root, torch.where(row == column, n + 1, 0.0))
        return A, root
    if measure == "legt":
        sign = torch.where(row >= column, 1.0, (-1.0) ** (row - column))
        return -root.unsqueeze(1) * root * sign / theta, root / theta
    boundary = _fourier(torch.zeros(1, dtype=torch.float64), d_state)[0]  # g_n at either end of the window
    A = -2 * boundary.unsqueeze(1) * boundary
    for cosine in range(1, d_state - 1, 2):
        frequency = 2 * math.pi * (cosine + 1) / 2
        A[cosine, cosine + 1] -= frequency
        A[cosine + 1, cosine] += frequency
    return A / theta, 2 * boundary / theta


def _fourier(s: Tensor, d_state: int) -> Tensor:
    """1, then sqrt(2) cos and sin of 2 pi m s in turn, ``(len(s), N)``."""
    m = (torch.arange(d_state, device=s.device) + 1) // 2
    angle = 2 * math.pi * m * s.unsqueeze(1)
    odd = torch.arange(d_state, device=s.device) % 2 == 1
    basis = math.sqrt(2) * torch.where(odd, angle.cos(), angle.sin())
    basis[:, 0] = 1
    return basis


def _legendre(z: Tensor, d_state: int) -> Tensor:
    """sqrt(2n + 1) P_n(z), ``(len(z), N)``."""
    values = np.polynomial.legendre.legvander(z.numpy(), d_state - 1)
    return torch.from_numpy(values) * torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64) + 1)


def nplr(measure: str, d_state: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write a HiPPO matrix as normal plus low rank: A = V (diag(Lambda) - P P^*) V^* with V unitary.

    Args:
        measure: ``"legs"`` (rank 1), ``"legt"`` (rank 2) or ``"fout"`` (rank 1).
        d_state: N.

    Returns:
        ``Lambda`` ``(N,)`` with imaginary parts ascending, ``P`` ``(N, rank)``, ``B`` ``(N,)`` in the new basis and
        ``V`` ``(N, N)``, all complex128.

    Source:
        Gu et al. 2021, "S4", theorem 1.
    """
    A, B = hippo_matrices(measure, d_state)
    n = torch.arange(d_state, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    if measure == "legs":
        P = (root / math.sqrt(2)).unsqueeze(1)
    elif measure == "legt":
        P = torch.stack([root * (n % 2 == 0), root * (n % 2 == 1)], dim=1)
    else:
        P = (B / math.sqrt(2)).unsqueeze(1)
    normal = A + P @ P.T  # skew-symmetric plus a multiple of the identity
    real = normal.diagonal().mean()
    imaginary, V = torch.linalg.eigh(-1j * (normal - real * torch.eye(d_state, dtype=torch.float64)))
    inverse = V.mH
    return torch.complex(real.expand(d_state), imaginary), inverse @ P.to(V.dtype), inverse @ B.to(V.dtype), V


class HiPPO:
    """A memory of a signal, and the signal read back from it.

    Args:
        measure: ``"legs"``, ``"legt"`` or ``"fout"``.
        d_state: Number of coefficients.
        theta: Length of the window of ``legt`` and ``fout``.
        method: Discretisation, see :func:`discretize`.
    """

    def __init__(self, measure: str, d_state: int, theta: float = 1.0, method: str = "bilinear") -> None:
        self.measure, self.d_state, self.theta, self.method = measure, d_state, theta, method
        self.A, self.B = hippo_matrices(measure, d_state, theta)

    def project(self, signal: Tensor, dt: float) -> Tensor:
        """Return the coefficients after each sample.

        Args:
            signal: Samples, ``(L,)``; sample k holds on the interval that ends at time ``(k + 1) dt``.
            dt: Time between samples.

        Returns:
            ``(L, N)`` in float64.
        """
        coefficients, state = [], torch.zeros(self.d_state, dtype=torch.float64)
        if self.measure != "legs":
            A, B = discretize(self.A, self.B, dt, self.method)
        for k, value in enumerate(signal.double()):
            if self.measure == "legs":
                # c' = (A c + B u) / t does not depend on the unit of time: in log t its step is log((k + 1) / k)
                A, B = self._legs_step(k)
            state = A @ state + B * value
            coefficients.append(state)
        return torch.stack(coefficients)

    def _legs_step(self, k: int) -> tuple[Tensor, Tensor]:
        if k == 0:  # everything so far is one value: the constant function
            first = torch.zeros(self.d_state, dtype=torch.float64)
            first[0] = 1
            return torch.zeros_like(self.A), first
        return discretize(self.A, self.B, math.log((k + 1) / k), self.method)

    def basis(self, times: Tensor, now: float) -> Tensor:
        """Return the basis functions at earlier times, ``(len(times), N)``."""
        times = times.double()
        if self.measure == "legs":
            return _legendre(2 * times / now - 1, self.d_state)
        if self.measure == "legt":
            return _legendre(2 * (times - now) / self.theta + 1, self.d_state)
        return _fourier((now - times) / self.theta, self.d_state)

    def reconstruct(self, coefficients: Tensor, times: Tensor, now: float) -> Tensor:
        """Return the signal at earlier times from the coefficients at one time.

        Args:
            coefficients: ``(N,)``.
            times: ``(T,)``, at most ``now``; for ``legt`` and ``fout`` not before ``now - theta``.
            now: The time that the coefficients belong to.

        Returns:
            ``(T,)``.
        """
        return self.basis(times, now) @ coefficients
