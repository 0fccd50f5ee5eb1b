"""HiPPO, discretisation, S4 and S4D: known matrices, reconstruction, convolution equal to recurrence."""

import math

import pytest
import torch

from visionmamba.language.state_space import S4, S4D, HiPPO, S4DMixer, discretize, hippo_matrices, nplr


def test_known_matrices():
    A, B = hippo_matrices("legs", 3)
    root = [1, math.sqrt(3), math.sqrt(5)]
    expected = [[-1, 0, 0], [-root[1], -2, 0], [-root[2], -root[1] * root[2], -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor(root, dtype=torch.float64))
    A, B = hippo_matrices("legt", 2, theta=2.0)
    expected = torch.tensor([[-1, root[1]], [-root[1], -3]], dtype=torch.float64) / 2
    torch.testing.assert_close(A, expected)
    A, B = hippo_matrices("fout", 3)
    two = 2 * math.sqrt(2)
    expected = [[-2, -two, 0], [-two, -4, -2 * math.pi], [0, 2 * math.pi, 0]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([2, two, 0], dtype=torch.float64))


@pytest.mark.parametrize("theta", [1.0, 0.4])
@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_matrices_differentiate_the_coefficients(measure, theta):
    """For a signal inside the span, c' = A c + B u holds exactly; differentiate the projections numerically."""
    size = 4 if measure != "fout" else 5
    A, B = hippo_matrices(measure, size, theta)
    hippo = HiPPO(measure, size, theta)
    nodes, weights = (torch.from_numpy(x) for x in __import__("numpy").polynomial.legendre.leggauss(60))

    def signal(x):
        if measure == "fout":  # periodic in the window, so that both ends agree
            return 0.3 + torch.sin(2 * math.pi * x / theta) - 0.5 * torch.cos(4 * math.pi * x / theta)
        return 0.3 - x + 2 * x**2 - 0.7 * x**3

    def coefficients(now):
        window = now if measure == "legs" else theta
        times = now - window * (1 - nodes) / 2
        return hippo.basis(times, now).T @ (signal(times) * weights / 2)

    now, h = 1.3, 1e-5
    derivative = (coefficients(now + h) - coefficients(now - h)) / (2 * h)
    drive = A @ coefficients(now) + B * signal(torch.tensor(now, dtype=torch.float64))
    torch.testing.assert_close(derivative, drive / now if measure == "legs" else drive, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("measure", "window", "error"), [("legs", 1.0, 0.03), ("legt", 0.5, 0.03), ("fout", 0.5, 0.12)]
)
def test_reconstruction(measure, window, error):
    length = 1000
    times = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    signal = torch.sin(9 * times) + 0.5 * torch.cos(23 * times)
    hippo = HiPPO(measure, 33, theta=window, method="zoh")
    coefficients = hippo.project(signal, 1 / length)
    recent = times > 1 - window
    inner = times[recent][20:-20]
    restored = hippo.reconstruct(coefficients[-1], inner, 1.0)
    relative = (restored - signal[recent][20:-20]).norm() / signal[recent][20:-20].norm()
    assert relative < error
    few = HiPPO(measure, 5, theta=window, method="zoh")
    coarse = few.reconstruct(few.project(signal, 1 / length)[-1], inner, 1.0)
    assert (coarse - signal[recent][20:-20]).norm() > 1.5 * (restored - signal[recent][20:-20]).norm()


@pytest.mark.parametrize("diagonal", [True, False])
def test_discretisations(diagonal):
    """Zero-order hold is exact for constant input; the others converge to it with their order."""
    torch.manual_seed(0)
    A = -torch.rand(4, dtype=torch.float64) - 0.1
    B = torch.randn(4, dtype=torch.float64)
    exact = torch.exp(A * 0.3), (torch.exp(A * 0.3) - 1) / A * B

    def run(method, dt=0.3):
        A_bar, B_bar = discretize(A if diagonal else torch.diag(A), B, dt, method)
        return (A_bar if diagonal else A_bar.diagonal()), B_bar

    torch.testing.assert_close(run("zoh"), exact)
    for method, order in (("euler", 2), ("backward_euler", 2), ("bilinear", 3)):
        errors = [
            max((a - b).abs().max() for a, b in zip(run(method, dt), run("zoh", dt), strict=True))
            for dt in (0.02, 0.01)
        ]
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_zero_order_hold_of_singular_systems():
    A_bar, B_bar = discretize(torch.zeros(2, 2), torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close((A_bar, B_bar), (torch.eye(2), torch.tensor([0.5, 1.0])))
    A_bar, B_bar = discretize(torch.zeros(2), torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close((A_bar, B_bar), (torch.ones(2), torch.tensor([0.5, 1.0])))


@pytest.mark.parametrize(("measure", "rank"), [("legs", 1), ("legt", 2), ("fout", 1)])
def test_normal_plus_low_rank(measure, rank):
    A, B = hippo_matrices(measure, 9)
    eigenvalues, P, B_new, V = nplr(measure, 9)
    assert P.shape == (9, rank)
    torch.testing.assert_close(V @ V.mH, torch.eye(9, dtype=V.dtype))
    torch.testing.assert_close(V @ (torch.diag(eigenvalues) - P @ P.mH) @ V.mH, A.to(V.dtype))
    torch.testing.assert_close(V @ B_new, B.to(V.dtype))


LAYERS = {
    **{f"s4_{m}": (lambda m=m: S4(3, 8, m, dt_min=0.01)) for m in ("legs", "legt", "fout")},
    **{f"s4d_{i}": (lambda i=i: S4D(3, 6, i)) for i in ("legs", "lin", "inv", "real")},
    "s4d_bilinear": lambda: S4D(3, 6, method="bilinear"),
}


@pytest.mark.parametrize("length", [1, 2, 37, 64])
@pytest.mark.parametrize("name", LAYERS)
def test_convolution_equals_recurrence(name, length):
    torch.manual_seed(0)
    layer, u = LAYERS[name](), torch.randn(2, length, 3)
    convolved, (stepped, state) = layer(u), layer.recurrent(u)
    torch.testing.assert_close(convolved, stepped, rtol=1e-3, atol=2e-4)
    cotangent = torch.randn_like(u)
    gradients = [torch.autograd.grad(y, [*layer.parameters()], cotangent) for y in (convolved, stepped)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=5e-3 * max(1.0, b.abs().max().item()))
    y, _ = layer.step(torch.randn(2, 3), state)
    assert y.shape == (2, 3)


def test_s4_is_the_discretised_hippo_system():
    torch.manual_seed(0)
    layer = S4(1, 6, "legs", dt_min=0.05, dt_max=0.05)
    A, B = hippo_matrices("legs", 6)
    A_bar, B_bar = discretize(A, B, 0.05, "bilinear")
    _, _, _, V = nplr("legs", 6)
    C = torch.view_as_complex(layer.C.detach())[0].to(V.dtype) @ V.mH
    kernel = torch.stack([(C @ (torch.linalg.matrix_power(A_bar, l) @ B_bar).to(V.dtype)).real for l in range(20)])  # noqa: E741
    torch.testing.assert_close(layer.kernel(20)[0].double(), kernel, rtol=1e-3, atol=1e-4)


def test_mixer_decodes_and_keeps_sequences_apart():
    from visionmamba.language import InferenceParams

    torch.manual_seed(0)
    mixer, x = S4DMixer(8, layer_idx=0), torch.randn(1, 9, 8)
    parameters = InferenceParams(9, 1)
    first = mixer(x[:, :5], inference_params=parameters)
    parameters.seqlen_offset = 5
    second = mixer(x[:, 5:], inference_params=parameters)
    torch.testing.assert_close(torch.cat([first, second], 1), mixer(x), rtol=1e-4, atol=1e-5)
    packed = mixer(x, cu_seqlens=torch.tensor([0, 4, 9]))
    torch.testing.assert_close(packed, torch.cat([mixer(x[:, :4]), mixer(x[:, 4:])], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hippo_matrices("lagt", 4), "measure: expected one of legs, legt, fout, got 'lagt'"),
        (lambda: discretize(torch.zeros(2), torch.zeros(2), 1.0, "tustin"), "method: expected one of zoh"),
        (lambda: S4D(2, 4, init="rand"), "init: expected one of legs, lin, inv, real, got 'rand'"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
