"""SSD on every backend: goldens, the sequential reference, paths, packed sequences, dispatcher behaviour, bad input."""

import pytest
import torch
from _goldens import operator_goldens
from torch.utils.flop_counter import FlopCounterMode

from visionmamba.ops import causal_conv1d, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, rmsnorm_fn
from visionmamba.ops.ssd import path_ssd_reference, ssd_scan

OPERATOR = "ssd"
CROSS = "h,v,h_flip,v_flip"


def _inputs(
    batch=2, length=30, directions=1, heads=4, head_dim=8, groups=2, states=16, shared=True, D=1, z=None, state=True,
    dtype=torch.float32, device="cpu", seed=0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    one, each = (batch, length, heads, head_dim), (batch, length, directions, heads, head_dim)
    tensors = {
        "x": normal(*(one if shared else each)),
        "dt": normal(batch, length, directions, heads) - 1,
        "A": -normal(directions, heads).mul(0.5).exp(),
        "B": normal(batch, length, directions, groups, states),
        "C": normal(batch, length, directions, groups, states),
        "dt_bias": normal(directions, heads),
    }
    if D:
        tensors["D"] = normal(directions, heads, *([head_dim] if D == 2 else []))
    if z:
        tensors["z"] = normal(*(one if z == 1 else each))
    if state:
        tensors["initial_states"] = normal(batch, directions, heads, head_dim, states)
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}


def _compare(tensors, tolerance, **options):
    """Compare outputs and every gradient with the reference, in float64 on the CPU."""
    chunk_size = options.pop("chunk_size", 16)
    seq_idx = options.pop("seq_idx", None)
    wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}
    expected = path_ssd_reference(**wide, seq_idx=seq_idx, **options)
    device = tensors["x"].device
    out = ssd_scan(**tensors, seq_idx=None if seq_idx is None else seq_idx.to(device), chunk_size=chunk_size, **options)
    cotangents = [torch.randn(e.shape, generator=torch.Generator().manual_seed(1)).to(e.dtype) for e in expected]
    torch.autograd.backward(expected, cotangents)
    torch.autograd.backward(out, [c.to(o) for c, o in zip(cotangents, out, strict=True)])
    pairs = {"y": (out[0], expected[0]), "state": (out[1], expected[1])}
    pairs |= {f"grad_{name}": (tensors[name].grad, wide[name].grad) for name in tensors}
    for name, (result, reference) in pairs.items():
        scale = max(1.0, reference.abs().max().item())
        error = (result.detach().cpu().double() - reference).abs().max().item() / scale
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize("name", operator_goldens("ssd"))
def test_goldens(name, device):
    golden = operator_goldens("ssd")[name]
    inputs = golden.inputs(device=device)
    limit = golden.params["dt_limit"] or (0.0, float("inf"))
    y, final, *varlen = mamba_chunk_scan_combined(
        **inputs, chunk_size=golden.params["chunk_size"], dt_softplus=golden.params["dt_softplus"],
        dt_limit=tuple(limit), return_final_states=True, return_varlen_states="cu_seqlens" in inputs,
    )  # fmt: skip
    outputs = {"y": y, "final_states": final} | ({"varlen_states": varlen[0]} if varlen else {})
    golden.backward(outputs)
    golden.check(outputs, inputs)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"length": 1}, {}),
        ({"length": 17, "heads": 1, "head_dim": 5, "groups": 1, "states": 3}, {"chunk_size": 256}),
        ({"length": 49, "D": 2, "z": 1, "states": 1}, {"chunk_size": 32}),
        ({"length": 197, "head_dim": 16, "state": False, "D": 0, "batch": 1}, {"chunk_size": 64}),
        ({"length": 130, "groups": 4, "batch": 1}, {"dt_limit": (0.1, 0.7)}),
        ({"length": 33, "dt_softplus": False}, {"dt_softplus": False}),
        ({"length": 550, "heads": 2, "groups": 1, "batch": 1}, {"chunk_size": 64}),
    ],
    ids=["one", "odd", "n1", "l197", "limit", "no_softplus", "segments"],
)
def test_sequence_against_reference(shape, options, device):
    shape.pop("dt_softplus", None)
    _compare(_inputs(**shape, device=device), 2e-5, **options)


@pytest.mark.parametrize(
    ("path", "grid", "length", "directions", "shared", "merge", "z"),
    [
        (CROSS, (5, 6), 30, 4, True, True, None),
        (CROSS, (7, 7), 49, 4, False, False, 2),
        (CROSS, (4, 9), 36, 4, True, True, 1),
        ("w3,v_flip", (5, 6), 36, 2, False, False, None),
        ("sub_200,subT_201,sub_210,subT_211", (5, 4), 24, 4, True, True, None),
        ("h,h_flip|cls", (3, 4), 13, 2, True, True, 1),
    ],
)
def test_paths_against_reference(path, grid, length, directions, shared, merge, z, device):
    tensors = _inputs(length=length, directions=directions, shared=shared, z=z, D=2, groups=1, device=device)
    _compare(tensors, 2e-5, path=path, grid=grid, merge=merge)


@pytest.mark.parametrize(("length", "chunk_size"), [(40, 16), (550, 64)])
def test_packed_sequences_against_reference(length, chunk_size, device):
    generator = torch.Generator().manual_seed(3)
    seq_idx = torch.sort(torch.randint(0, 6, (2, length), generator=generator), dim=1).values
    seq_idx[0] -= seq_idx[0].min()
    _compare(_inputs(length=length, z=1, device=device), 2e-5, seq_idx=seq_idx, chunk_size=chunk_size)


def test_packed_sequences_do_not_leak(device):
    tensors = {name: t.detach() for name, t in _inputs(batch=1, length=60, state=False, device=device).items()}
    cu_seqlens = torch.tensor([0, 7, 8, 39, 60], device=device)
    split = {name: t.squeeze(2) if name in ("dt", "B", "C") else t for name, t in tensors.items()}
    split |= {name: t.squeeze(0) for name, t in split.items() if name in ("A", "D", "dt_bias")}
    packed, states = mamba_chunk_scan_combined(
        **split, chunk_size=16, cu_seqlens=cu_seqlens, dt_softplus=True, return_varlen_states=True
    )
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        alone = {n: t[:, start:end] if t.shape[:2] == (1, 60) else t for n, t in split.items()}
        y, final = mamba_chunk_scan_combined(**alone, chunk_size=16, dt_softplus=True, return_final_states=True)
        torch.testing.assert_close(packed[:, start:end], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[i], final[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device, backend_name):
    if backend_name == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    tensors = _inputs(length=49, directions=4, head_dim=16, device=device)
    for name in ("x", "dt", "B", "C"):
        tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
    _compare(tensors, 3 * torch.finfo(dtype).eps, path=CROSS, grid=(7, 7))


def test_chunks_pass_their_state_on(device):
    tensors = {name: t.detach() for name, t in _inputs(length=50, device=device).items()}
    whole, last = ssd_scan(**tensors)
    first = {n: t[:, :21] if t.shape[:2] == (2, 50) else t for n, t in tensors.items()}
    second = {n: t[:, 21:] if t.shape[:2] == (2, 50) else t for n, t in tensors.items()}
    head, state = ssd_scan(**first)
    tail, final = ssd_scan(**(second | {"initial_states": state}))
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)


def test_deterministic(device):
    def run():
        tensors = _inputs(length=70, directions=4, seed=5, device=device)
        out, _ = ssd_scan(**tensors, path=CROSS, grid=(7, 10))
        out.square().sum().backward()
        return [out, *(t.grad for t in tensors.values() if t.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradcheck():
    tensors = _inputs(
        batch=1, length=7, directions=2, heads=2, head_dim=2, groups=1, states=2, z=1, dtype=torch.float64
    )
    names = list(tensors)

    def run(*values):
        return ssd_scan(**dict(zip(names, values, strict=True)), path="h,h_flip", chunk_size=3)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


def test_opcheck():
    t = _inputs(batch=1, length=12, directions=2, head_dim=4, states=4)
    options = ("h,v", [3, 4], True, 0.0, float("inf"), True, 8)
    arguments = [t.get(n) for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx")]
    torch.library.opcheck(torch.ops.visionmamba.ssd.default, (*arguments, *options))


def test_compile_fullgraph():
    tensors = _inputs(length=12, head_dim=4, states=4)
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    out = compiled(**tensors)
    out[0].sum().backward()
    torch.testing.assert_close(out, ssd_scan(**tensors))


def test_flops():
    tensors = _inputs(batch=2, length=12, heads=4, head_dim=8, states=16)
    with FlopCounterMode(display=False) as counter:
        ssd_scan(**tensors)[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 4 * (5 * 8 * 16 + 3 * 8 + 2)


@pytest.mark.parametrize(
    ("d_mlp", "groups", "norm", "before"), [(0, 1, True, False), (6, 2, True, True), (0, 2, False, False)]
)
def test_split_conv1d_scan_combined(d_mlp, groups, norm, before):
    torch.manual_seed(0)
    batch, length, heads, head_dim, states = 2, 21, 4, 6, 5
    d_ssm, d_conv = heads * head_dim, heads * head_dim + 2 * groups * states
    projected = torch.randn(batch, length, 2 * d_mlp + d_ssm + d_conv + heads)
    weight, bias = torch.randn(d_conv, 4), torch.randn(d_conv)
    dt_bias, A, D = torch.randn(heads), -torch.rand(heads), torch.randn(heads)
    norm_weight = torch.randn(d_ssm) if norm else None
    out_weight = torch.randn(7, d_mlp + d_ssm)
    out, final = mamba_split_conv1d_scan_combined(
        projected, weight, bias, dt_bias, A, D, chunk_size=8, return_final_states=True, rmsnorm_weight=norm_weight,
        outproj_weight=out_weight, headdim=head_dim, ngroups=groups, norm_before_gate=before,
    )  # fmt: skip

    gate, value, z, xBC, dt = projected.split([d_mlp, d_mlp, d_ssm, d_conv, heads], dim=-1)
    x, B, C = causal_conv1d(xBC, weight[None], bias[None])[0][:, :, 0].split([d_ssm, *[groups * states] * 2], dim=-1)
    y, state = path_ssd_reference(
        x.unflatten(-1, (heads, head_dim)), dt[:, :, None], A[None], B.reshape(batch, length, 1, groups, states),
        C.reshape(batch, length, 1, groups, states), D[None], dt_bias=dt_bias[None],
    )  # fmt: skip
    y = y.flatten(-2)
    if norm:
        y = rmsnorm_fn(y, norm_weight, None, z, 1e-6, d_ssm // groups, before)
    else:
        y = y * torch.nn.functional.silu(z)
    expected = torch.cat([torch.nn.functional.silu(gate) * value, y], dim=-1) @ out_weight.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, state[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 30, 32)}, r"x: expected \(B, L, H, P\)"),
        ({"dt": (2, 30, 1, 3)}, "dt: expected shape"),
        ({"B": (2, 30, 1, 3, 16), "C": (2, 30, 1, 3, 16)}, "B: expected a number of groups that divides the 4 heads"),
        ({"D": (4,)}, "D: expected shape"),
        ({"initial_states": (2, 4, 8, 16)}, "initial_states: expected shape"),
    ],
)
def test_bad_shapes(change, message):
    tensors = {name: t.detach() for name, t in _inputs().items()} | {n: torch.zeros(s) for n, s in change.items()}
    with pytest.raises(ValueError, match=message):
        ssd_scan(**tensors)


@pytest.mark.parametrize("bounds", [[0, 10], [1, 30], [0, 12, 12, 30], [0, 20, 10, 30], [0]])
def test_cu_seqlens_must_cover(bounds):
    x = torch.zeros(1, 30, 2, 4)
    projection = torch.zeros(1, 30, 1, 3)
    with pytest.raises(ValueError, match="cu_seqlens: expected increasing boundaries from 0 to 30 tokens"):
        mamba_chunk_scan_combined(
            x, torch.zeros(1, 30, 2), -torch.ones(2), projection, projection, 8, cu_seqlens=torch.tensor(bounds)
        )


def test_cu_seqlens_are_integers():
    x, projection = torch.zeros(1, 30, 2, 4), torch.zeros(1, 30, 1, 3)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected integers, got torch\.float32"):
        mamba_chunk_scan_combined(
            x, torch.zeros(1, 30, 2), -torch.ones(2), projection, projection, 8, cu_seqlens=torch.tensor([0.0, 30.0])
        )


def test_cu_seqlens_need_a_batch_of_one():
    x, projection = torch.zeros(2, 30, 2, 4), torch.zeros(2, 30, 1, 3)
    with pytest.raises(ValueError, match="batch of 1, got a batch of 2"):
        mamba_chunk_scan_combined(
            x, torch.zeros(2, 30, 2), -torch.ones(2), projection, projection, 8, cu_seqlens=torch.tensor([0, 30])
        )
