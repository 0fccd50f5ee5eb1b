"""Draw the figures of ``from_hippo_to_s6.md``: ``python docs/plots/from_hippo_to_s6.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from visionmamba.language.state_space import S4, S4D, HiPPO, discretize, hippo_matrices
from visionmamba.language.synthetic import selective_copying
from visionmamba.ops import selective_scan

OUT = Path(__file__).resolve().parents[1] / "images"


def _signal(times: torch.Tensor) -> torch.Tensor:
    return torch.sin(9 * times) + 0.6 * torch.sin(31 * times) * (times > 0.5) + 0.4 * torch.cos(3 * times)


def _save(figure: plt.Figure, name: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(OUT / f"{name}.png", dpi=110)
    plt.close(figure)


def memories() -> None:
    """The signal, and what each memory of 25 numbers knows of it at the end."""
    length = 1500
    times = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    signal = _signal(times)
    figure, axes = plt.subplots(3, 1, figsize=(8, 6), sharex=True)
    for axis, measure in zip(axes, ("legs", "legt", "fout"), strict=True):
        window = 1.0 if measure == "legs" else 0.4
        hippo = HiPPO(measure, 25, theta=window, method="zoh")
        coefficients = hippo.project(signal, 1 / length)[-1]
        recent = times > 1 - window
        axis.plot(times, signal, color="0.7", linewidth=3, label="signal")
        axis.plot(
            times[recent], hippo.reconstruct(coefficients, times[recent], 1.0), label=f"{measure}, 25 coefficients"
        )
        axis.legend(loc="lower left")
    axes[-1].set_xlabel("time")
    _save(figure, "hippo_memories")


def matrices() -> None:
    """The matrices that update them."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    for axis, measure in zip(axes, ("legs", "legt", "fout"), strict=True):
        A, _ = hippo_matrices(measure, 17)
        bound = float(A.abs().max())
        axis.imshow(A, cmap="RdBu", vmin=-bound, vmax=bound)
        axis.set(title=f"A of {measure}", xticks=[], yticks=[])
    _save(figure, "hippo_matrices")


def discretisations() -> None:
    """A damped oscillation, stepped by each rule with a coarse step."""
    A = torch.tensor([[-0.4, -6.0], [6.0, -0.4]], dtype=torch.float64)
    B = torch.tensor([1.0, 0.0], dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(8, 3))
    fine = torch.linspace(0, 4, 800, dtype=torch.float64)
    exact = torch.exp(-0.4 * fine) * torch.cos(6 * fine)
    axis.plot(fine, exact, color="0.6", linewidth=3, label="exact")
    dt, steps = 0.1, 40
    for method in ("zoh", "bilinear", "euler", "backward_euler"):
        A_bar, _ = discretize(A, B, dt, method)
        state = torch.tensor([1.0, 0.0], dtype=torch.float64)
        values = []
        for _ in range(steps):
            values.append(float(state[0]))
            state = A_bar @ state
        axis.plot(torch.arange(steps) * dt, values, ".-", markersize=4, linewidth=0.8, label=method)
    axis.set(xlabel="time", ylim=(-2, 2))
    axis.legend(ncols=3)
    _save(figure, "discretisations")


def kernels() -> None:
    """Convolution kernels of S4 and S4D at initialisation."""
    torch.manual_seed(0)
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
    for axis, layer, title in (
        (axes[0], S4(4, 64, "legs", dt_min=0.003, dt_max=0.03), "S4-LegS"),
        (axes[1], S4D(4, 32, "lin", dt_min=0.003, dt_max=0.03), "S4D-Lin"),
    ):
        axis.plot(layer.kernel(512).detach().T / layer.kernel(512).detach().abs().amax(1), linewidth=0.9)
        axis.set(title=f"{title}: four channels' kernels", xlabel="steps")
    _save(figure, "s4_kernels")


def selection() -> None:
    """A state with fixed steps, and one whose step size opens on the tokens that matter."""
    inputs, _ = selective_copying(1, length=48, num_tokens=5, generator=torch.Generator().manual_seed(3))
    token = inputs[0, :48]
    matters = (token > 1).float()
    u = torch.where(matters > 0, token / 8 - 1, 0.3 * torch.sin(torch.arange(48.0)))
    ones = torch.ones(1, 48, 1, 1)
    A = torch.tensor([[[-1.0]]])

    def states(delta: torch.Tensor) -> torch.Tensor:
        return selective_scan(u.reshape(1, 48, 1), delta.reshape(1, 48, 1, 1), A, ones, ones, delta_softplus=False)[0][
            0, :, 0
        ]

    figure, axes = plt.subplots(2, 1, figsize=(8, 4.2), sharex=True)
    axes[0].stem(u, linefmt="0.7", markerfmt=" ", basefmt="0.8", label="input; the marked tokens matter")
    axes[0].plot(matters.nonzero().squeeze(1), u[matters > 0], "o", color="tab:red")
    axes[0].legend()
    axes[1].plot(states(torch.full((48,), 0.2)), label="fixed step 0.2: a moving average of everything")
    axes[1].plot(states(0.001 + 2.5 * matters), label="step 2.5 on marked tokens, else 0.001: holds the last of them")
    axes[1].set(xlabel="step", ylim=(-2.2, 4.5))
    axes[1].legend()
    _save(figure, "selection")


def main() -> None:
    """Draw every figure."""
    for figure in (memories, matrices, discretisations, kernels, selection):
        figure()


if __name__ == "__main__":
    main()
