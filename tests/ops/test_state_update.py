"""The decoding step on every backend: goldens, the reference, slots for continuous batching, bad input."""

import pytest
import torch
from _goldens import operator_goldens

from visionmamba.ops import selective_state_update
from visionmamba.ops.state_update import selective_state_update_ref

OPERATOR = "selective_state_update"


def _expanded(inputs):
    """Head-sized dt, A, dt_bias and D as views over the head's channels (and A's states)."""
    heads, head_dim, states = inputs["state"].shape[1:]
    views = dict(inputs)
    for name in ("dt", "dt_bias", "D"):
        if name in views:
            views[name] = views[name].unsqueeze(-1).expand(*views[name].shape, head_dim)
    views["A"] = views["A"][:, None, None].expand(heads, head_dim, states)
    return views


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", operator_goldens("selective_state_update"))
def test_goldens(name, dtype, device, backend_name):
    if dtype == torch.float64 and backend_name in ("cuda", "triton"):
        pytest.skip("the GPU kernels have no float64")
    golden = operator_goldens("selective_state_update")[name]
    inputs = {key: tensor.detach() for key, tensor in golden.inputs(dtype, device).items()}
    views = _expanded(inputs) if golden.params["tie_hdim"] else inputs
    out = selective_state_update(**views, dt_softplus=golden.params["dt_softplus"])
    golden.check({"out": out, "state": inputs["state"]}, {})


def _inputs(batch=3, heads=4, head_dim=6, groups=2, states=5, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "state": normal(batch, heads, head_dim, states), "x": normal(batch, heads, head_dim),
        "dt": normal(batch, heads, head_dim), "A": -normal(heads, head_dim, states).exp(),
        "B": normal(batch, groups, states), "C": normal(batch, groups, states), "D": normal(heads, head_dim),
        "z": normal(batch, heads, head_dim), "dt_bias": normal(heads, head_dim),
    }  # fmt: skip


@pytest.mark.parametrize("absent", [(), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
@pytest.mark.parametrize("shape", [{}, {"states": 1, "head_dim": 3}, {"heads": 1, "groups": 1, "states": 33}])
def test_against_reference(shape, absent, device):
    inputs = {name: tensor for name, tensor in _inputs(**shape, device=device).items() if name not in absent}
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    expected = selective_state_update_ref(**wide, dt_softplus=True)
    out = selective_state_update(**inputs, dt_softplus=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs["state"].double(), wide["state"], rtol=1e-5, atol=1e-5)


def test_half_precision_activations(device):
    inputs = _inputs(device=device)
    half = {n: t.bfloat16() if n in ("x", "dt", "B", "C", "z") else t.clone() for n, t in inputs.items()}
    wide = {name: tensor.double() for name, tensor in half.items()}
    expected = selective_state_update_ref(**wide, dt_softplus=True)
    out = selective_state_update(**half, dt_softplus=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(half["state"].double(), wide["state"], rtol=1e-5, atol=1e-5)


def test_slots(device):
    inputs = _inputs(batch=4, device=device)
    slots = torch.tensor([5, -1, 0, 2], device=device)
    pool = torch.randn(7, *inputs["state"].shape[1:], device=device)
    before = pool.clone()
    out = selective_state_update(**(inputs | {"state": pool}), dt_softplus=True, state_batch_indices=slots)
    used = slots[slots >= 0]
    rows = (slots >= 0).nonzero().squeeze(1)
    alone = {n: t[rows] if t.shape[0] == 4 and n not in ("A", "D", "dt_bias") else t for n, t in inputs.items()}
    alone["state"] = before[used].clone()
    torch.testing.assert_close(out[rows], selective_state_update(**alone, dt_softplus=True))
    torch.testing.assert_close(pool[used], alone["state"])
    assert out[1].abs().max() == 0
    untouched = [i for i in range(7) if i not in used.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_opcheck():
    t = _inputs()
    arguments = (*(t[n] for n in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, None)
    torch.library.opcheck(torch.ops.visionmamba.selective_state_update.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": (3, 5)}, r"state: expected \(B, D, N\) or \(B, H, P, N\)"),
        ({"state": (2, 4, 6, 5)}, "state: expected a batch of 3"),
        ({"A": (4, 6)}, "A: expected shape"),
        ({"B": (3, 3, 5), "C": (3, 3, 5)}, "B: expected a number of groups that divides the 4 heads, got 3"),
        ({"z": (3, 24)}, "z: expected shape"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        selective_state_update(**(_inputs() | {name: torch.zeros(shape) for name, shape in change.items()}))
