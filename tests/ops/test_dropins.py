"""mamba_ssm's and causal_conv1d's functions against the official code's results and their documented meaning."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from _compare import skip_if_unsupported
from _goldens import operator_goldens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionmamba.ops import (
    backend,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_scan_fn,
    selective_scan_ref,
)

DTYPES = [torch.float32, torch.float64]
SCANS = operator_goldens("selective_scan")
CONVS = operator_goldens("causal_conv1d")


def of_kind(kind):
    return [name for name, case in CONVS.items() if case.params["kind"] == kind]


def assert_close(actual, expected, relative=2e-6):
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= relative, float(error)


class _Counter(TorchDispatchMode):
    """Counts the operators that run, and the elements of their results."""

    calls = elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        self.calls += 1
        self.elements += sum(x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor))
        return results


class TestSelectiveScanGoldens:
    OPERATOR = "selective_scan"

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    @pytest.mark.parametrize("name", SCANS)
    def test_fn(self, name, dtype, device):
        case = SCANS[name]
        inputs = case.inputs(dtype, device)
        softplus = case.params["delta_softplus"]
        with skip_if_unsupported():
            out, last_state = selective_scan_fn(**inputs, delta_softplus=softplus, return_last_state=True)
        case.backward({"out": out})
        case.check({"out": out, "last_state": last_state}, inputs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    @pytest.mark.parametrize("name", SCANS)
    def test_ref(self, name, dtype):
        case = SCANS[name]
        inputs = case.inputs(dtype)
        out, last_state = selective_scan_ref(
            **inputs, delta_softplus=case.params["delta_softplus"], return_last_state=True
        )
        case.backward({"out": out})
        case.check({"out": out, "last_state": last_state}, inputs)


class TestCausalConv1dGoldens:
    OPERATOR = "causal_conv1d"

    @pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    @pytest.mark.parametrize("name", of_kind("fn"))
    def test_fn(self, name, dtype, layout, device):
        case = CONVS[name]
        inputs = case.inputs(dtype, device)
        x = inputs["x"]
        if layout == "channels_last":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        options = {name: case.params[name] for name in ("activation", "return_final_states")}
        with skip_if_unsupported():
            out = causal_conv1d_fn(**(inputs | {"x": x}), **options)
        outputs = dict(zip(("out", "final_states"), out if isinstance(out, tuple) else (out,), strict=False))
        case.backward(outputs)
        case.check(outputs, inputs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    @pytest.mark.parametrize("name", of_kind("update"))
    def test_update(self, name, dtype):
        case = CONVS[name]
        inputs = case.inputs(dtype)
        out = causal_conv1d_update(**inputs, activation=case.params["activation"])
        case.check({"out": out, "conv_state": inputs["conv_state"]}, inputs)

    @pytest.mark.parametrize("name", of_kind("varlen_states"))
    def test_varlen_states(self, name):
        case = CONVS[name]
        inputs = case.inputs()
        case.check({"states": causal_conv1d_varlen_states(**inputs, state_len=case.params["state_len"])}, inputs)

    def test_every_case_is_used(self):
        assert sum(len(of_kind(kind)) for kind in ("fn", "update", "varlen_states")) == len(CONVS) == 17
        assert len(SCANS) == 32


def scan_inputs(batch=2, channels=6, length=11, states=4, groups_B=1, groups_C=1, complex_A=False, dtype=torch.float64):
    """Random inputs; groups 0 stand for a constant B or C, None for the 3-d form."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=dtype)

    def projection(groups):
        if groups == 0:
            return normal(channels, states, dtype=dtype.to_complex() if complex_A else dtype)
        steps = length * (2 if complex_A else 1)
        return normal(batch, states, steps) if groups is None else normal(batch, groups, states, steps)

    A = -torch.exp(normal(channels, states))
    tensors = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length),
        "A": torch.complex(A, normal(channels, states)) if complex_A else A,
        "B": projection(groups_B),
        "C": projection(groups_C),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


class TestSelectiveScanFn:
    @pytest.mark.parametrize("complex_A", [False, True], ids=["real", "complex"])
    @pytest.mark.parametrize("groups_B", [0, None, 2, 3])
    @pytest.mark.parametrize("groups_C", [0, None, 2, 6])
    def test_every_form_agrees_with_the_reference(self, groups_B, groups_C, complex_A):
        inputs = scan_inputs(groups_B=groups_B, groups_C=groups_C, complex_A=complex_A)
        results = []
        for function in (selective_scan_fn, selective_scan_ref):
            out, last_state = function(**inputs, delta_softplus=True, return_last_state=True)
            loss = (out * out.detach().cos()).sum() + torch.view_as_real(last_state + 0j).square().sum()
            results.append([out, last_state, *torch.autograd.grad(loss, list(inputs.values()))])
        for ours, reference in zip(*results, strict=True):
            assert ours.shape == reference.shape and ours.dtype == reference.dtype
            assert_close(ours, reference, 1e-12)

    @pytest.mark.parametrize("groups_B", [0, 2])
    def test_gradcheck(self, groups_B):
        inputs = scan_inputs(batch=1, channels=2, length=5, states=2, groups_B=groups_B, complex_A=True)
        names = list(inputs)

        def function(*tensors):
            return selective_scan_fn(**dict(zip(names, tensors, strict=True)), return_last_state=True)

        assert torch.autograd.gradcheck(function, tuple(inputs.values()))

    def test_second_derivative_of_the_complex_scan(self):
        inputs = scan_inputs(batch=1, channels=1, length=4, states=2, complex_A=True)
        tensors = tuple(inputs[name] for name in ("u", "delta", "A", "B", "C"))
        assert torch.autograd.gradgradcheck(selective_scan_fn, tensors)

    def test_output_keeps_the_memory_order_of_u(self):
        inputs = scan_inputs()
        channels_first = selective_scan_fn(**inputs)
        assert channels_first.is_contiguous()
        last = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta", "z")}
        channels_last = selective_scan_fn(**(inputs | last))
        assert channels_last.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(channels_last, channels_first)

    def test_half_precision_follows_u(self):
        inputs = {name: x.detach().float() for name, x in scan_inputs().items()}
        half = {name: inputs[name].bfloat16() for name in ("u", "delta", "z", "B", "C")}
        out, last_state = selective_scan_fn(**(inputs | half), return_last_state=True)
        assert out.dtype == torch.bfloat16 and last_state.dtype == torch.float32
        widened = {name: x.float() for name, x in half.items()}
        reference, reference_state = selective_scan_ref(**(inputs | widened), return_last_state=True)
        torch.testing.assert_close(out.float(), reference, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(last_state, reference_state, rtol=1e-5, atol=1e-5)

    def test_mixed_dtypes_are_computed_in_the_widest(self):
        inputs = {name: x.detach().float() for name, x in scan_inputs().items()}
        out = selective_scan_fn(**(inputs | {"u": inputs["u"].bfloat16()}))
        reference = selective_scan_ref(**(inputs | {"u": inputs["u"].bfloat16().float()}))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), reference, rtol=2**-8, atol=1e-6)

    @pytest.mark.parametrize("complex_A", [False, True], ids=["real", "complex"])
    def test_empty_batch(self, complex_A):
        inputs = scan_inputs(batch=0, complex_A=complex_A)
        out, last_state = selective_scan_fn(**inputs, return_last_state=True)
        assert out.shape == (0, 6, 11) and last_state.shape == (0, 6, 4)
        out.sum().backward()

    def test_a_long_complex_scan_takes_few_operators(self):
        """A loop over the steps would take thousands, and tensors of all steps at each of them."""
        taken = {length: _Counter() for length in (256, 1024)}
        for length, counter in taken.items():
            inputs = scan_inputs(length=length, complex_A=True, dtype=torch.float32)
            with counter:
                selective_scan_fn(**inputs).sum().backward()
        assert 50 < taken[1024].calls < 1024
        assert taken[1024].elements < 6 * taken[256].elements

    def test_compiles_and_exports(self):
        class Scan(torch.nn.Module):
            def forward(self, u, delta, A, B, C):
                return selective_scan_fn(u, delta, A, B, C, delta_softplus=True)

        inputs = scan_inputs(dtype=torch.float32, groups_B=2, groups_C=2)
        tensors = tuple(inputs[name].detach() for name in ("u", "delta", "A", "B", "C"))
        expected = selective_scan_fn(*tensors, delta_softplus=True)
        compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), expected)
        batch = torch.export.Dim("batch")
        shapes = {"u": {0: batch}, "delta": {0: batch}, "A": None, "B": {0: batch}, "C": {0: batch}}
        exported = torch.export.export(Scan(), tensors, dynamic_shapes=shapes).module()
        tripled = [
            x if name == "A" else x.repeat(3, *[1] * (x.dim() - 1)) for name, x in zip("udABC", tensors, strict=True)
        ]
        torch.testing.assert_close(exported(*tripled), expected.repeat(3, 1, 1))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"u": (2, 6)}, ValueError, r"u: expected \(B, D, L\), got shape \(2, 6\)"),
            ({"delta": (2, 6, 10)}, ValueError, r"delta: expected shape \(2, 6, 11\), got \(2, 6, 10\)"),
            ({"A": (5, 4)}, ValueError, r"A: expected \(D, N\) with D = 6, got shape \(5, 4\)"),
            ({"B": (6, 3)}, ValueError, r"B: expected shape \(6, 4\), got \(6, 3\)"),
            ({"B": (2, 4, 12)}, ValueError, r"B: expected shape \(2, 4, 11\), got \(2, 4, 12\)"),
            ({"C": (2, 5, 4, 11)}, ValueError, r"C: .*G a divisor of D = 6, got shape \(2, 5, 4, 11\)"),
            ({"D": (5,)}, ValueError, r"D: expected shape \(6,\), got \(5,\)"),
            ({"z": (2, 6)}, ValueError, r"z: expected shape \(2, 6, 11\), got \(2, 6\)"),
            ({"delta_bias": (6, 1)}, ValueError, r"delta_bias: expected shape \(6,\), got \(6, 1\)"),
            ({"u": torch.int64}, TypeError, "u: expected dtype float32 or float16 or bfloat16 or float64, got int64"),
            ({"C": torch.complex64}, TypeError, "C: expected dtype .*, got complex64"),
            ({"B": "meta"}, ValueError, r"B: expected device cpu \(that of u\), got meta"),
        ],
    )
    def test_bad_argument_is_named(self, change, error, message):
        inputs = {name: x.detach() for name, x in scan_inputs().items()}
        for name, value in change.items():
            inputs[name] = torch.ones(value) if isinstance(value, tuple) else inputs[name].to(value)
        for function in (selective_scan_fn, selective_scan_ref):
            with pytest.raises(error, match=message):
                function(**inputs)


def conv_reference(x, weight, bias=None, past=None):
    """Depthwise causal convolution by PyTorch's own conv1d."""
    channels, width = weight.shape
    past = x.new_zeros(*x.shape[:2], width - 1) if past is None else past
    return F.conv1d(torch.cat([past, x], dim=2), weight.unsqueeze(1), bias, groups=channels)


class TestCausalConv1dFn:
    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_against_conv1d(self, width):
        x, weight, bias = torch.randn(2, 5, 9), torch.randn(5, width), torch.randn(5)
        torch.testing.assert_close(causal_conv1d_fn(x, weight, bias), conv_reference(x, weight, bias))
        for activation in ("silu", "swish"):
            out = causal_conv1d_fn(x, weight, bias, activation=activation)
            torch.testing.assert_close(out, F.silu(conv_reference(x, weight, bias)))

    def test_states_join_the_parts_of_a_sequence(self):
        x, weight = torch.randn(2, 5, 9), torch.randn(5, 4)
        whole = causal_conv1d_fn(x, weight, activation="silu")
        states, parts = torch.zeros(2, 5, 3), []
        for part in x.split([1, 2, 4, 2], dim=2):
            out, states = causal_conv1d_fn(
                part, weight, initial_states=states, return_final_states=True, activation="silu"
            )
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole)
        torch.testing.assert_close(states, x[:, :, -3:])

    def test_final_states_out_is_written(self):
        x, weight, buffer = torch.randn(2, 5, 9), torch.randn(5, 4), torch.full((2, 5, 3), torch.nan)
        _, states = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=buffer)
        assert states is buffer
        torch.testing.assert_close(buffer, x[:, :, -3:])

    def test_negative_sequences_are_padding(self):
        x = torch.randn(1, 3, 6, requires_grad=True)
        seq_idx = torch.tensor([[0, 0, -1, -1, 1, 1]], dtype=torch.int32)
        out = causal_conv1d_fn(x, torch.randn(3, 3), torch.ones(3), seq_idx)
        assert (out[:, :, 2:4] == 0).all() and (out[:, :, [0, 1, 4, 5]] != 0).all()
        out.sum().backward()
        assert (x.grad[:, :, 2:4] == 0).all()

    def test_output_keeps_the_memory_order_of_x(self):
        x, weight = torch.randn(2, 5, 9), torch.randn(5, 4)
        assert causal_conv1d_fn(x, weight).is_contiguous()
        out = causal_conv1d_fn(x.transpose(1, 2).contiguous().transpose(1, 2), weight)
        assert out.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.ones(2, 5)}, ValueError, r"x: expected \(B, D, L\), got shape \(2, 5\)"),
            ({"x": torch.ones(2, 5, 9).int()}, TypeError, "x: expected dtype .*, got int32"),
            ({"weight": torch.ones(5, 5)}, ValueError, r"weight: expected \(D, W\) .* W from 2 to 4, got .*\(5, 5\)"),
            ({"bias": torch.ones(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
            ({"seq_idx": torch.ones(2, 8).int()}, ValueError, r"seq_idx: expected shape \(2, 9\), got \(2, 8\)"),
            ({"seq_idx": torch.ones(2, 9)}, TypeError, "seq_idx: expected dtype int32 or int64, got float32"),
            ({"initial_states": torch.ones(2, 5, 4)}, ValueError, r"initial_states: expected shape \(2, 5, 3\)"),
            ({"final_states_out": torch.ones(2, 5, 4)}, ValueError, r"final_states_out: expected shape \(2, 5, 3\)"),
            ({"activation": "relu"}, ValueError, "activation: expected None, 'silu' or 'swish', got 'relu'"),
        ],
    )
    def test_bad_argument_is_named(self, change, error, message):
        with pytest.raises(error, match=message):
            causal_conv1d_fn(**({"x": torch.ones(2, 5, 9), "weight": torch.ones(5, 4)} | change))


class TestCausalConv1dUpdate:
    @pytest.mark.parametrize("size", [3, 4, 7])
    @pytest.mark.parametrize("circular", [False, True])
    @pytest.mark.parametrize("steps", [1, 2, 9])
    def test_decoding_equals_the_whole_sequence(self, size, circular, steps):
        x, weight, bias = torch.randn(2, 5, 18), torch.randn(5, 4), torch.randn(5)
        whole = causal_conv1d_fn(x, weight, bias, activation="silu")
        state, parts = torch.zeros(2, 5, size), []
        for start in range(0, 18, steps):
            part = x[:, :, start] if steps == 1 else x[:, :, start : start + steps]
            seen = torch.full((2,), start, dtype=torch.int32) if circular else None
            out = causal_conv1d_update(part, state, weight, bias, "silu", cache_seqlens=seen)
            assert out.shape == part.shape
            parts.append(out.unsqueeze(2) if steps == 1 else out)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole)
        newest = x[:, :, -size:] if not circular else x[:, :, 18 - size :].roll(18 % size, dims=2)
        torch.testing.assert_close(state, newest)

    def test_indices_choose_the_states_and_padding_updates_nothing(self):
        cache, x, weight = torch.randn(6, 5, 4), torch.randn(4, 5), torch.randn(5, 4)
        before, indices = cache.clone(), torch.tensor([4, 0, -1, 2], dtype=torch.int32)
        out = causal_conv1d_update(x, cache, weight, conv_state_indices=indices)
        rows, slots = [0, 1, 3], [4, 0, 2]
        expected_state = before[slots]
        expected = causal_conv1d_update(x[rows], expected_state, weight)
        torch.testing.assert_close(out[rows], expected)
        assert (out[2] == 0).all()
        torch.testing.assert_close(cache[slots], expected_state)
        assert torch.equal(cache[[1, 3, 5]], before[[1, 3, 5]])

    def test_padding_alone_changes_nothing(self):
        cache = torch.randn(3, 5, 4)
        before = cache.clone()
        padding = torch.full((2,), -1, dtype=torch.int64)
        out = causal_conv1d_update(torch.randn(2, 5), cache, torch.randn(5, 4), conv_state_indices=padding)
        assert (out == 0).all() and torch.equal(cache, before)

    def test_half_precision_accumulates_in_float32(self):
        x, state = torch.randn(2, 5).bfloat16(), torch.randn(2, 5, 3).bfloat16()
        weight = torch.randn(5, 4)
        expected = conv_reference(x.float().unsqueeze(2), weight, past=state.float()).squeeze(2)
        out = causal_conv1d_update(x, state, weight)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-7)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.ones(2, 5, 1, 1)}, ValueError, r"x: expected \(B, D\) or \(B, D, L\), got shape"),
            ({"conv_state": torch.ones(2, 5, 2)}, ValueError, r"conv_state: expected \(2, 5, S\) with S at least 3"),
            ({"conv_state": torch.ones(3, 5, 3)}, ValueError, r"conv_state: expected \(2, 5, S\) .*got shape \(3, 5"),
            ({"weight": torch.ones(4, 4)}, ValueError, r"weight: expected \(D, W\) with D = 5"),
            ({"bias": torch.ones(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
            ({"activation": "gelu"}, ValueError, "activation: expected None, 'silu' or 'swish', got 'gelu'"),
            ({"cache_seqlens": torch.ones(3).int()}, ValueError, r"cache_seqlens: expected shape \(2,\), got \(3,\)"),
            ({"conv_state_indices": torch.ones(2)}, TypeError, "conv_state_indices: expected dtype int32 or int64"),
            ({"conv_state": torch.ones(2, 5, 3, device="meta")}, ValueError, "conv_state: expected device cpu"),
        ],
    )
    def test_bad_argument_is_named_and_changes_nothing(self, change, error, message):
        arguments = {"x": torch.ones(2, 5), "conv_state": torch.zeros(2, 5, 3), "weight": torch.ones(5, 4)} | change
        with pytest.raises(error, match=message):
            causal_conv1d_update(**arguments)
        assert arguments["conv_state"].is_meta or arguments["conv_state"].unique().numel() == 1


class TestVarlenStates:
    def test_sequences_of_every_length(self):
        x, ends = torch.randn(9, 4), [0, 0, 1, 4, 9]
        states = causal_conv1d_varlen_states(x, torch.tensor(ends, dtype=torch.int32), 3)
        for i, (start, end) in enumerate(pairwise(ends)):
            padded = torch.cat([torch.zeros(3, 4), x[start:end]])
            torch.testing.assert_close(states[i], padded[-3:].T)

    def test_continues_the_sequences(self):
        x, weight = torch.randn(7, 4), torch.randn(4, 4)
        states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 7]), 3)
        following = torch.randn(2, 4)
        out = causal_conv1d_update(following, states, weight)
        for i, part in enumerate((x[:2], x[2:])):
            whole = torch.cat([part, following[i : i + 1]]).T.unsqueeze(0)
            torch.testing.assert_close(out[i], conv_reference(whole, weight)[0, :, -1])

    def test_bad_argument_is_named(self):
        with pytest.raises(ValueError, match=r"x: expected \(T, D\), got shape \(2, 3, 4\)"):
            causal_conv1d_varlen_states(torch.ones(2, 3, 4), torch.tensor([0, 2]), 3)
        with pytest.raises(ValueError, match=r"cu_seqlens: expected \(B \+ 1,\), got shape \(1, 2\)"):
            causal_conv1d_varlen_states(torch.ones(2, 3), torch.tensor([[0, 2]]), 3)
        with pytest.raises(TypeError, match="cu_seqlens: expected dtype int32 or int64, got float32"):
            causal_conv1d_varlen_states(torch.ones(2, 3), torch.tensor([0.0, 2.0]), 3)


def test_functions_run_on_the_forced_backend():
    with backend("torch"):
        inputs = {name: x.detach().float() for name, x in scan_inputs().items()}
        torch.testing.assert_close(selective_scan_fn(**inputs), selective_scan_ref(**inputs), rtol=1e-5, atol=1e-5)
