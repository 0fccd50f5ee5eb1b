"""The causal convolution on every backend of this machine against the step-by-step reference in float64."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from _compare import assert_same_training_step, assert_within_rounding, largest_errors, skip_if_unsupported
from torch.utils.flop_counter import FlopCounterMode

from visionmamba.ops import backend, causal_conv1d, causal_conv1d_reference, scan_path

OPERATOR = "causal_conv1d"
ACTIVATIONS = ("out", "final_states", "grad_x")


@dataclass(frozen=True)
class Case:
    """One mix of the operator's options."""

    path: str = "h"
    grid: tuple[int, ...] = (7,)
    batch: int = 2
    channels: int = 5
    width: int = 4
    shared_x: bool = True
    bias: bool = True
    initial: bool = False
    silu: bool = True
    sequences: int = 0  # 0: no seq_idx
    layout: str = "contiguous"  # "padded", "transposed", "stride_0"

    def options(self):
        return dict(path=self.path, grid=list(self.grid), silu=self.silu)

    def leaves(self, dtype=torch.float32, device="cpu"):
        """Return random leaf tensors; x is rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(sum(map(ord, repr(self))))
        path = scan_path(self.path, self.grid)
        B, L, K, D = self.batch, path.num_tokens, path.num_directions, self.channels
        shape = (B, L, D) if self.shared_x else (B, L, 1 if self.layout == "stride_0" else K, D)
        if self.layout == "padded":
            shape = (*shape[:-1], D + 3)
        if self.layout == "transposed":
            shape = (B, *shape[:0:-1])
        tensors = {"x": torch.randn(shape, generator=generator).to(dtype)}
        shapes = {"weight": (K, D, self.width)}
        shapes |= {"bias": (K, D)} if self.bias else {}
        shapes |= {"initial_states": (B, K, D, self.width - 1)} if self.initial else {}
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        tensors |= {name: torch.randn(s, generator=generator).to(parameter_dtype) for name, s in shapes.items()}
        return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}

    def arguments(self, leaves):
        """Return the operator's arguments: the leaves, or views of them in the case's layout."""
        x = leaves["x"]
        if self.layout == "padded":
            x = x[..., 1:-2]
        if self.layout == "transposed":
            x = x.permute(0, *range(x.dim() - 1, 0, -1))
        if self.layout == "stride_0":
            x = x.expand(-1, -1, scan_path(self.path, self.grid).num_directions, -1)
        arguments = leaves | {"x": x}
        if self.sequences:
            tokens = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            arguments["seq_idx"] = (tokens * self.sequences // x.shape[1]).int()
        return arguments


def results(function, case, leaves):
    """Return the outputs and all gradients of a call, for cotangents that are the same for every dtype."""
    out, final_states = function(**case.arguments(leaves), **case.options())
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (out, final_states)]
    torch.autograd.backward([out, final_states], cotangents)
    outputs = {"out": out.detach(), "final_states": final_states.detach()}
    return outputs | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


@cache
def expected(case, dtype=torch.float32):
    """Return the reference's results in float64, and how far it is from them in float32."""
    narrow = case.leaves(dtype)
    reference, in_float32 = (
        results(causal_conv1d_reference, case, {name: x.detach().to(d).requires_grad_() for name, x in narrow.items()})
        for d in (torch.float64, torch.float32)
    )
    return reference, largest_errors(in_float32, reference)


def check(case, device, dtype=torch.float32):
    """Compare an implementation with the reference."""
    actual = results(causal_conv1d, case, case.leaves(dtype, device))
    assert_within_rounding(actual, *expected(case, dtype), dtype, ACTIVATIONS)


CROSS = "h,v,h_flip,v_flip"
CASES = {
    "plain": Case(),
    "one_step": Case(grid=(1,)),
    "shorter_than_the_filter": Case(path="h,h_flip", grid=(2,), initial=True),
    "width_2": Case(path="h,v", grid=(3, 5), width=2, initial=True),
    "width_3": Case(path="h,v", grid=(3, 5), width=3),
    "vim_197": Case(path="h,h_flip", grid=(197,), channels=9),
    "cross_49": Case(path=CROSS, grid=(7, 7), channels=33),
    "separate_inputs": Case(path=CROSS, grid=(3, 5), shared_x=False, initial=True),
    "bare": Case(path="v_flip", grid=(3, 5), bias=False, silu=False),
    "no_silu": Case(path="h,v", grid=(3, 5), silu=False, initial=True),
    "one_channel": Case(path="h,v", grid=(3, 5), channels=1),
    "wide": Case(path="h,h_flip", grid=(3, 3), channels=130),
    "sequences": Case(grid=(17,), sequences=4),
    "sequences_both_ways": Case(path="h,h_flip", grid=(17,), sequences=5, initial=True, silu=False),
    "sequences_of_one": Case(path="h,h_flip", grid=(6,), sequences=6),
    "local_windows": Case(path="h,h_flip,w2,w7_flip", grid=(14, 14), channels=3),
    "windows_pad": Case(path="w7,h", grid=(9, 5), channels=3),
    "unequal_lengths": Case(path="h,w2_flip,v_flip", grid=(3, 5), shared_x=False, initial=True),
    "one_sub_grid": Case(path="sub_200", grid=(5, 6)),
    "class_token": Case(path="h,v_flip|cls", grid=(3, 4)),
    "three_d": Case(path="thw,twh_flip,wht", grid=(2, 3, 4), width=3),
    "padded_views": Case(path=CROSS, grid=(3, 5), layout="padded"),
    "transposed_views": Case(path="h,v", grid=(3, 5), layout="transposed"),
    "stride_0": Case(path="h,v", grid=(3, 5), shared_x=False, layout="stride_0"),
    "empty_batch": Case(path="h,v", grid=(3, 5), batch=0, initial=True),
}


class TestSmoke:
    def test_shapes_and_dtypes(self, device):
        case = Case(path=CROSS, grid=(3, 5))
        out, final_states = causal_conv1d(**case.leaves(device=device), **case.options())
        assert out.shape == (2, 15, 4, 5) and out.is_contiguous()
        assert final_states.shape == (2, 4, 5, 3) and final_states.is_contiguous()

    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_raster_order_is_conv1d(self, width, device):
        x, weight = torch.randn(2, 9, 5), torch.randn(1, 5, width)
        out = causal_conv1d(x.to(device), weight.to(device), silu=False)[0].squeeze(2).transpose(1, 2).cpu()
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        torch.testing.assert_close(out, F.conv1d(padded, weight[0].unsqueeze(1), groups=5))

    def test_inputs_stay_as_they_are(self, device):
        case = CASES["separate_inputs"]
        leaves = case.leaves(device=device)
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        results(causal_conv1d, case, leaves)
        assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())

    def test_is_deterministic(self, device):
        case = CASES["cross_49"]
        runs = [results(causal_conv1d, case, case.leaves(device=device)) for _ in range(2)]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

    @pytest.mark.parametrize("width", [2, 4])
    def test_results_outlive_the_next_call(self, width, device):
        x, weight = torch.randn(2, 1, 9, 1, device=device), torch.randn(1, 1, width, device=device)
        first = causal_conv1d(x[0], weight)
        kept = [result.clone() for result in first]
        causal_conv1d(x[1], weight)
        assert all(torch.equal(result, before) for result, before in zip(first, kept, strict=True))


class TestAgainstReference:
    @pytest.mark.parametrize("name", CASES)
    def test_float32(self, name, device):
        check(CASES[name], device)

    @pytest.mark.parametrize("name", CASES)
    def test_float64(self, name, device):
        case = CASES[name]
        wide = {key: leaf.detach().double().requires_grad_() for key, leaf in case.leaves(device=device).items()}
        with skip_if_unsupported():
            actual = results(causal_conv1d, case, wide)
        for key, exact in expected(case)[0].items():
            torch.testing.assert_close(actual[key].cpu(), exact, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    @pytest.mark.parametrize("name", [name for name in CASES if name not in ("stride_0", "vim_197")])
    def test_half_precision_rounds_once(self, name, dtype, device):
        check(CASES[name], device, dtype)

    @pytest.mark.parametrize("length", [1, 2, 3, 7, 49, 63])
    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_odd_lengths(self, length, width, device):
        check(Case(path="h,h_flip", grid=(length,), width=width, channels=3), device)

    @pytest.mark.parametrize("directions", range(1, 9))
    def test_any_number_of_directions(self, directions, device):
        names = ["h", "v", "h_flip", "v_flip", "snake_h", "snake_v", "w2", "w3"][:directions]
        check(Case(path=",".join(names), grid=(3, 4), channels=3), device)

    def test_a_part_of_the_inputs_needs_gradients(self, device):
        case = CASES["separate_inputs"]
        full = results(causal_conv1d, case, case.leaves(device=device))
        for name in case.leaves():
            leaves = {key: leaf.detach() for key, leaf in case.leaves(device=device).items()}
            leaves[name].requires_grad_()
            assert torch.equal(results(causal_conv1d, case, leaves)[f"grad_{name}"], full[f"grad_{name}"])

    def test_gradient_of_the_final_states_alone(self, device):
        case = CASES["shorter_than_the_filter"]
        leaves = case.leaves(device=device)
        causal_conv1d(**leaves, **case.options())[1].sum().backward()
        # two new values push two of the three old ones out
        assert (leaves["x"].grad == 2).all() and (leaves["weight"].grad == 0).all()
        assert torch.equal(leaves["initial_states"].grad[0, 0, 0].cpu(), torch.tensor([0.0, 0.0, 1.0]))

    def test_states_join_the_parts_of_a_sequence(self, device):
        leaves = Case(grid=(12,)).leaves(device=device)
        whole, final_states = causal_conv1d(**leaves)
        state, parts = None, []
        for start, stop in ((0, 1), (1, 8), (8, 12)):
            out, state = causal_conv1d(**(leaves | {"x": leaves["x"][:, start:stop]}), initial_states=state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        assert torch.equal(state, final_states)

    def test_large_values_stay_finite(self, device):
        case = Case(path="h,v", grid=(3, 5))
        leaves = {name: (1e4 * x.detach()).requires_grad_() for name, x in case.leaves(device=device).items()}
        assert all(value.isfinite().all() for value in results(causal_conv1d, case, leaves).values())


class TestGradients:
    @pytest.mark.parametrize(
        "case",
        [
            Case(path="h,v_flip", grid=(2, 2), batch=1, channels=2, initial=True),
            Case(path="h,v", grid=(2, 2), batch=1, channels=2, width=2, shared_x=False, bias=False, silu=False),
            Case(path="h_flip", grid=(6,), batch=1, channels=2, width=3, sequences=2),
        ],
        ids=["shared", "separate", "sequences"],
    )
    def test_gradcheck(self, case, device):
        leaves = {name: x.detach().double() for name, x in case.leaves(device=device).items()}
        names = list(leaves)

        def function(*tensors):
            return causal_conv1d(**case.arguments(dict(zip(names, tensors, strict=True))), **case.options())

        with skip_if_unsupported():
            function(*leaves.values())
        assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in leaves.values()))


class Convolution(torch.nn.Module):
    """A tiny block around the operator, as models use it."""

    def __init__(self, channels=4, path="h,v_flip"):
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.randn(path.count(",") + 1, channels, 4))

    def forward(self, x):
        height, width = x.shape[1], x.shape[2]
        out, _ = causal_conv1d(x.flatten(1, 2), self.weight, path=self.path, grid=[height, width])
        return out.sum(2).view(x.shape)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Convolution(), torch.randn(2, 3, 5, 4)


class TestCompile:
    @pytest.mark.parametrize("name", ["separate_inputs", "sequences_both_ways", "bare"])
    def test_opcheck(self, name, device):
        case = replace(CASES[name], channels=3)
        arguments = case.arguments(case.leaves(device=device))
        names = ("x", "weight", "bias", "seq_idx", "initial_states")
        arguments = (*(arguments.get(name) for name in names), case.path, list(case.grid), case.silu)
        torch.library.opcheck(torch.ops.visionmamba.causal_conv1d.default, arguments)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        out, final_states = torch.ops.visionmamba.causal_conv1d(*detached)
        for dfinal_states in (None, final_states):
            torch.library.opcheck(
                torch.ops.visionmamba.causal_conv1d_backward.default, (out, dfinal_states, *detached),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip

    def test_fullgraph_with_dynamic_shapes(self, block):
        block, x = block
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        assert_same_training_step(compiled, block, x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_training_step(compiled, block, torch.randn(3, 6, 7, 4))

    def test_export_with_dynamic_batch(self, block):
        block, x = block
        exported = torch.export.export(block, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}).module()
        for batch in (1, 2, 7):
            x = torch.randn(batch, 3, 5, 4)
            torch.testing.assert_close(exported(x), block(x))

    def test_symbolic_trace(self, block):
        block, x = block
        assert_same_training_step(torch.fx.symbolic_trace(block), block, x)

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_torchscript(self, block):
        block, x = block
        for scripted in (torch.jit.script(block), torch.jit.trace(block, x)):
            assert_same_training_step(scripted, block, x)

    def test_meta_device(self):
        case = CASES["unequal_lengths"]
        leaves = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in case.leaves().items()}
        out, final_states = causal_conv1d(**leaves, **case.options())
        real, real_states = causal_conv1d(**case.leaves(), **case.options())
        assert (out.device.type, out.shape, out.dtype) == ("meta", real.shape, real.dtype)
        assert final_states.shape == real_states.shape
        out.sum().backward()
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())

    def test_autocast_changes_nothing(self, device):
        case = CASES["cross_49"]
        plain = results(causal_conv1d, case, case.leaves(device=device))
        with torch.autocast(device, torch.bfloat16):
            inside = results(causal_conv1d, case, case.leaves(device=device))
        assert all(torch.equal(inside[name], plain[name]) for name in plain)


class TestFlops:
    @pytest.mark.parametrize("shared_x", [True, False])
    def test_two_operations_a_tap(self, shared_x):
        case = Case(path="h,v", grid=(3, 5), shared_x=shared_x)
        with FlopCounterMode(display=False) as counter:
            out, _ = causal_conv1d(**case.leaves(), **case.options())
        assert counter.get_total_flops() == 2 * 2 * 15 * 2 * 5 * 4
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * (2 * 2 * 15 * 2 * 5 * 4)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": (2, 15)}, ValueError, r"x: expected \(B, L, D\) or \(B, L, K, D\), got shape \(2, 15\)"),
            ({"x": (2, 15, 6)}, ValueError, r"x: expected shape \(2, 15, 5\), got \(2, 15, 6\)"),
            ({"x": (2, 15, 3, 5)}, ValueError, r"x: expected shape \(2, 15, 2, 5\), got \(2, 15, 3, 5\)"),
            ({"weight": (5, 4)}, ValueError, r"weight: expected \(K, D, W\) with W from 2 to 4, got shape \(5, 4\)"),
            ({"weight": (2, 5, 5)}, ValueError, r"weight: expected \(K, D, W\) with W from 2 to 4, .* \(2, 5, 5\)"),
            ({"weight": (2, 5, 1)}, ValueError, r"weight: expected \(K, D, W\) with W from 2 to 4, .* \(2, 5, 1\)"),
            ({"bias": (5,)}, ValueError, r"bias: expected shape \(2, 5\), got \(5,\)"),
            ({"initial_states": (2, 2, 5, 4)}, ValueError, r"initial_states: expected shape \(2, 2, 5, 3\), got"),
            ({"seq_idx": (2, 15)}, TypeError, "seq_idx: expected dtype int32 or int64, got float32"),
            ({"seq_idx": (15,)}, ValueError, r"seq_idx: expected shape \(2, 15\), got \(15,\)"),
            ({"x": torch.int32}, TypeError, "x: expected dtype float32 or float16 or bfloat16 or float64, got int32"),
            ({"weight": torch.int64}, TypeError, "weight: expected dtype .*, got int64"),
            ({"bias": "meta"}, ValueError, r"bias: expected device cpu \(that of x\), got meta"),
            ({"path": "h"}, ValueError, "path: 'h' has 1 directions, but weight has 2"),
            ({"path": "h,diagonal"}, ValueError, "path: unknown direction 'diagonal'"),
            ({"grid": [4, 5]}, ValueError, r"grid: path 'h,v' over \(4, 5\) needs 20 tokens in memory, but x has 15"),
        ],
    )
    def test_bad_argument_is_named(self, change, error, message):
        case = Case(path="h,v", grid=(3, 5))
        arguments = {name: leaf.detach() for name, leaf in case.leaves().items()} | case.options()
        for name, value in change.items():
            if isinstance(value, tuple):
                value = torch.ones(value)
            elif isinstance(value, torch.dtype) or value == "meta":
                value = arguments[name].to(value)
            arguments[name] = value
        with pytest.raises(error, match=message):
            causal_conv1d(**arguments)

    def test_unsupported_backend(self):
        with backend("triton"), pytest.raises(RuntimeError, match="causal_conv1d: backend 'triton' was asked for"):
            causal_conv1d(**Case().leaves())
