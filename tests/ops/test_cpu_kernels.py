"""The fused CPU kernels against the sequential float64 reference: outputs, every gradient, edges, determinism."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visionmamba.ops import causal_conv1d_reference, explain, path_scan_reference
from visionmamba.ops.causal_conv1d import cpu as conv_cpu
from visionmamba.ops.scan_path import scan_path
from visionmamba.ops.selective_scan import cpu as scan_cpu

TOLERANCE = 1e-5
PATHS = [
    ("h", (1,)),
    ("h", (67,)),
    ("h,h_flip", (5, 7)),
    ("h,v,h_flip,v_flip", (6, 5)),
    ("sub_200,sub_210,subT_201,subT_211", (6, 6)),
    ("w3,h,h_flip|cls", (5, 4)),
    ("snake_h,snake_v_flip", (9, 11)),
]
HYPOTHESIS = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

pytestmark = pytest.mark.skipif(
    explain("selective_scan", "cpu")["cpu"] is not None, reason="numba cannot compile the kernels here"
)


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def scan_inputs(path, grid, channels, states, rank, *, batch=2, gate=None, shared_u=True, optional=True, seed=0):
    """Random arguments of the scan, in the order of its signature."""
    torch.manual_seed(seed)
    scan = scan_path(path, grid)
    tokens, directions = scan.num_tokens, scan.num_directions
    per_direction = (batch, tokens, directions)
    gate_shape = {None: None, "shared": (batch, tokens, channels), "own": (*per_direction, channels)}[gate]
    return {
        "u": torch.randn((batch, tokens, channels) if shared_u else (*per_direction, channels)),
        "delta": torch.randn(*per_direction, rank or channels) * 0.5,
        "A": -torch.rand(directions, channels, states) * 3 - 0.1,
        "B": torch.randn(*per_direction, states),
        "C": torch.randn(*per_direction, states),
        "D": torch.randn(directions, channels) if optional else None,
        "z": None if gate is None else torch.randn(gate_shape),
        "delta_bias": torch.randn(directions, channels) - 2 if optional else None,
        "dt_weight": torch.randn(directions, channels, rank) * 0.3 if rank else None,
        "initial_state": torch.randn(batch, directions, channels, states) if optional else None,
    }


def scan_reference(inputs, path, grid, softplus=True, merge=True, step_order=False):
    return path_scan_reference(
        **inputs, path=path, grid=grid, delta_softplus=softplus, merge=merge, projections_in_step_order=step_order
    )


def compare_scan(inputs, path, grid, softplus=True, merge=True, step_order=False, with_last=True):
    """Return the relative error of the outputs and of every gradient."""
    exact = {name: None if x is None else x.double().requires_grad_() for name, x in inputs.items()}
    y, last = scan_reference(exact, path, grid, softplus, merge, step_order)
    dy, dlast = torch.randn_like(y), torch.randn_like(last) if with_last else None
    loss = (y * dy).sum() + (0 if dlast is None else (last * dlast).sum())
    names = [name for name in inputs if inputs[name] is not None]
    expected = dict(zip(names, torch.autograd.grad(loss, [exact[name] for name in names]), strict=True))
    arguments = (*inputs.values(), path, grid, softplus, merge, step_order)
    actual_y, actual_last = scan_cpu.forward(*arguments)
    gradients = scan_cpu.backward(dy.float(), None if dlast is None else dlast.float(), *arguments)
    gradients = dict(zip(inputs, gradients, strict=True))
    assert all((gradients[name] is None) == (inputs[name] is None) for name in inputs)
    errors = {"y": relative_error(actual_y, y), "last_state": relative_error(actual_last, last)}
    return errors | {f"d{name}": relative_error(gradients[name], expected[name]) for name in names}


@HYPOTHESIS
@given(
    path=st.sampled_from(PATHS),
    channels=st.sampled_from([1, 7, 16, 33, 48]),
    states=st.sampled_from([1, 2, 5, 16, 20]),
    rank=st.sampled_from([0, 1, 3, 18]),
    gate=st.sampled_from([None, "shared", "own"]),
    shared_u=st.booleans(),
    merge=st.booleans(),
    softplus=st.booleans(),
    step_order=st.booleans(),
    optional=st.booleans(),
    with_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scan_matches_the_reference(
    path, channels, states, rank, gate, shared_u, merge, softplus, step_order, optional, with_last, seed
):
    name, grid = path
    if merge and gate == "own":
        gate = "shared"
    inputs = scan_inputs(name, grid, channels, states, rank, gate=gate, shared_u=shared_u, optional=optional, seed=seed)
    if not softplus:  # raw steps must be positive, or the states grow without bound
        inputs["delta"] = inputs["delta"].abs() * 0.2
        if optional:
            inputs["delta_bias"] = inputs["delta_bias"].abs() * 0.1
        if rank:
            inputs["dt_weight"] = inputs["dt_weight"].abs()
    errors = compare_scan(inputs, name, grid, softplus, merge, step_order, with_last)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("states", "rank"), [(1, 6), (16, 12)])
def test_scan_over_a_long_path(states, rank):
    """More steps than a segment by far, and more channel blocks than groups."""
    inputs = scan_inputs("h,v_flip", (11, 13), 160, states, rank, batch=1, gate="shared")
    errors = compare_scan(inputs, "h,v_flip", (11, 13))
    assert max(errors.values()) < TOLERANCE, errors


def test_scan_reads_views():
    """Strided activations, a stride of 0 along the directions, and an expanded batch."""
    dense = scan_inputs("h,v", (4, 5), 24, 4, 3, gate="shared")
    tokens, directions = 20, 2
    packed = torch.randn(2, tokens, 5 + 24 + 24)
    views = dict(dense)
    views["u"], views["z"] = packed[..., 5:29], packed[..., 29:]
    views["B"] = torch.randn(2, tokens, 1, 9)[..., 2:6].expand(-1, -1, directions, -1)
    views["C"] = torch.randn(1, tokens, directions, 4).expand(2, -1, -1, -1)
    views["delta"] = torch.randn(2, directions, tokens, 3).transpose(1, 2)
    views["A"] = -torch.rand(directions, 4, 24).transpose(1, 2)
    assert not any(views[name].is_contiguous() for name in ("u", "z", "B", "C", "delta", "A"))
    errors = compare_scan(views, "h,v", (4, 5))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("states", [1, 4])
def test_scan_with_extreme_steps(states):
    """Steps from 0 to huge, decays from 1 to below the smallest float32, stay finite and right."""
    inputs = scan_inputs("h,h_flip", (33,), 16, states, 0)
    scale = torch.logspace(-3, 2.5, 33).reshape(1, 33, 1, 1)
    inputs["delta"] = torch.randn_like(inputs["delta"]).sign() * scale
    inputs["A"] = inputs["A"] * 50
    errors = compare_scan(inputs, "h,h_flip", (33,))
    assert max(errors.values()) < TOLERANCE, errors


def test_scan_passes_nan_on():
    inputs = scan_inputs("h", (9,), 16, 2, 0, gate="shared")
    inputs["delta"][0, 4, 0, 3] = float("nan")
    y, _ = scan_cpu.forward(*inputs.values(), "h", (9,), True, True, False)
    assert y[0, :4].isfinite().all()
    assert y[0, 4:, 3].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scan_of_half_precision_computes_in_float32(dtype):
    inputs = scan_inputs("h,v", (5, 5), 32, 4, 3, gate="shared")
    rounded = {name: x.to(dtype) if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
    y, last = scan_cpu.forward(*rounded.values(), "h,v", (5, 5), True, True, False)
    widened = {name: None if x is None else x.float() for name, x in rounded.items()}
    expected, expected_last = scan_cpu.forward(*widened.values(), "h,v", (5, 5), True, True, False)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(last, expected_last)


def test_scan_refuses_float64():
    inputs = {name: x.double() for name, x in scan_inputs("h", (4,), 3, 2, 2, gate="shared").items()}
    assert "float64" in scan_cpu._supports(*inputs.values(), "h", (4,), True, True, False)


def test_empty_batch():
    inputs = scan_inputs("h,v", (3, 4), 8, 2, 3, batch=0, gate="shared")
    arguments = (*inputs.values(), "h,v", (3, 4), True, True, False)
    y, last = scan_cpu.forward(*arguments)
    gradients = scan_cpu.backward(torch.empty_like(y), None, *arguments)
    assert y.shape == inputs["u"].shape
    assert last.shape == inputs["initial_state"].shape
    for name, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == inputs[name].shape
        assert not gradient.any()
    out, _ = conv_cpu.forward(torch.empty(0, 12, 8), torch.randn(2, 8, 4), None, None, None, "h,v", (3, 4), True)
    assert out.shape == (0, 12, 2, 8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads):
    inputs = scan_inputs("h,v,h_flip,v_flip", (16, 15), 80, 3, 5, batch=3, gate="shared")
    arguments = (*inputs.values(), "h,v,h_flip,v_flip", (16, 15), True, True, False)
    torch.manual_seed(1)
    x, weight = torch.randn(3, 240, 80), torch.randn(4, 80, 4)
    convolution = (x, weight, None, None, None, "h,v,h_flip,v_flip", (16, 15), True)
    results = []
    for count in (1, 2, 3, 8, 2):
        threads(count)
        y, last = scan_cpu.forward(*arguments)
        out, final = conv_cpu.forward(*convolution)
        results.append(
            (
                y, last, *scan_cpu.backward(y, last, *arguments),
                out, final, *conv_cpu.backward(out, final, *convolution)[:2],
            )
        )  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@HYPOTHESIS
@given(
    path=st.sampled_from([*PATHS, ("h", (2,))]),
    channels=st.sampled_from([5, 16, 40]),
    width=st.integers(2, 4),
    shared_x=st.booleans(),
    sequences=st.booleans(),
    initial=st.booleans(),
    bias=st.booleans(),
    silu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_convolution_matches_the_reference(path, channels, width, shared_x, sequences, initial, bias, silu, seed):
    name, grid = path
    torch.manual_seed(seed)
    scan = scan_path(name, grid)
    tokens, directions = scan.num_tokens, scan.num_directions
    inputs = {
        "x": torch.randn((2, tokens, channels) if shared_x else (2, tokens, directions, channels)),
        "weight": torch.randn(directions, channels, width),
        "bias": torch.randn(directions, channels) if bias else None,
        "seq_idx": torch.randint(0, 3, (2, tokens)) if sequences else None,
        "initial_states": torch.randn(2, directions, channels, width - 1) if initial else None,
    }
    exact = {key: x if x is None or key == "seq_idx" else x.double().requires_grad_() for key, x in inputs.items()}
    out, final = causal_conv1d_reference(**exact, path=name, grid=grid, silu=silu)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    names = [key for key, x in inputs.items() if x is not None and key != "seq_idx"]
    expected = torch.autograd.grad((out * dout).sum() + (final * dfinal).sum(), [exact[key] for key in names])
    arguments = (*inputs.values(), name, grid, silu)
    actual_out, actual_final = conv_cpu.forward(*arguments)
    gradients = conv_cpu.backward(dout.float(), dfinal.float(), *arguments)
    gradients = dict(zip(("x", "weight", "bias", "initial_states"), gradients, strict=True))
    errors = {"out": relative_error(actual_out, out), "final": relative_error(actual_final, final)}
    errors |= {key: relative_error(gradients[key], x) for key, x in zip(names, expected, strict=True)}
    assert max(errors.values()) < TOLERANCE, errors


SMALL_CALL = """
import sys
import torch
from visionmamba.ops import selective_scan
assert "numba" not in sys.modules
torch.manual_seed(0)
u, delta, B = torch.randn(1, 6, 16), torch.randn(1, 6, 1, 16), torch.randn(1, 6, 1, 2)
y, _ = selective_scan(u, delta, -torch.ones(1, 16, 2), B, B)
print(y.sum().item())
"""


def _run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_compiled_kernels_are_kept_on_disk(tmp_path):
    first = _run(SMALL_CALL, VISIONMAMBA_CACHE_DIR=str(tmp_path / "cache"))
    again = _run(SMALL_CALL, VISIONMAMBA_CACHE_DIR=str(tmp_path / "cache"))
    (tmp_path / "file").write_text("not a folder")
    nowhere = _run(SMALL_CALL, VISIONMAMBA_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert first.stderr.count("compiling the CPU kernels") == 1
    assert "compiling" not in again.stderr
    assert "cannot be kept on disk" in nowhere.stderr
    assert first.stdout == again.stdout == nowhere.stdout


def test_a_forked_child_can_run_the_kernels():
    """After a fork the parent's threads are gone; the child must not wait for them."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    code = """
import os
import torch
from visionmamba.ops.selective_scan import cpu
torch.set_num_threads(2)
torch.manual_seed(0)
u, delta, B = torch.randn(4, 200, 64), torch.randn(4, 200, 1, 64), torch.randn(4, 200, 1, 4)
arguments = (u, delta, -torch.ones(1, 64, 4), B, B, *[None] * 5, "h", (200,), True, True, False)
expected, _ = cpu.forward(*arguments)
child = os.fork()
if child == 0:
    y, _ = cpu.forward(*arguments)
    os._exit(0 if (y.numpy() == expected.numpy()).all() else 1)  # torch's own threads are gone, too
assert os.waitpid(child, 0)[1] == 0
"""
    _run(code)
