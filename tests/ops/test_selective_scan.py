"""The selective scan on every backend of this machine against the step-by-step reference in float64."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from _compare import assert_same_training_step, assert_within_rounding, largest_errors, skip_if_unsupported
from torch.utils.flop_counter import FlopCounterMode

from visionmamba.ops import backend, path_scan_reference, scan_path, selective_scan
from visionmamba.ops.selective_scan import flops, pytorch

OPERATOR = "selective_scan"
CROSS = "h,v,h_flip,v_flip"


@dataclass(frozen=True)
class Case:
    """One mix of the operator's options."""

    path: str = "h"
    grid: tuple[int, ...] = (7,)
    batch: int = 2
    channels: int = 5
    states: int = 4
    shared_u: bool = True
    merge: bool = True
    rank: int = 0  # 0: delta has all channels
    D: bool = True
    z: str = ""  # "", "shared", "each"
    bias: bool = True
    initial: bool = False
    softplus: bool = True
    in_step_order: bool = False
    layout: str = "contiguous"  # "padded", "transposed", "shared_projections"

    def options(self):
        return dict(
            path=self.path,
            grid=list(self.grid),
            delta_softplus=self.softplus,
            merge=self.merge,
            projections_in_step_order=self.in_step_order,
        )

    def leaves(self, dtype=torch.float32, device="cpu"):
        """Return random leaf tensors; activations are rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(sum(map(ord, repr(self))))
        path = scan_path(self.path, self.grid)
        B, L, K, D, N = self.batch, path.num_tokens, path.num_directions, self.channels, self.states
        projections = 1 if self.layout == "shared_projections" else K
        shapes = {
            "u": (B, L, D) if self.shared_u else (B, L, K, D),
            "delta": (B, L, projections, self.rank or D),
            "B": (B, L, projections, N),
            "C": (B, L, projections, N),
            "z": (B, L, D) if self.z == "shared" else (B, L, K, D),
        }
        if not self.z:
            del shapes["z"]
        if self.layout == "padded":
            shapes = {name: (*shape[:-1], shape[-1] + 3) for name, shape in shapes.items()}
        if self.layout == "transposed":
            shapes = {name: (shape[0], *shape[:0:-1]) for name, shape in shapes.items()}
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        shapes = {"A": (K, D, N)}
        shapes |= {"D": (K, D)} if self.D else {}
        shapes |= {"delta_bias": (K, D)} if self.bias else {}
        shapes |= {"dt_weight": (K, D, self.rank)} if self.rank else {}
        shapes |= {"initial_state": (B, K, D, N)} if self.initial else {}
        tensors |= {name: torch.randn(s, generator=generator).to(parameter_dtype) for name, s in shapes.items()}
        tensors["A"] = -torch.exp(tensors["A"])
        if not self.softplus:  # positive step sizes: with negative ones states grow, and so does any rounding
            tensors["delta"] = 0.1 * tensors["delta"].abs()
            tensors |= {name: 0.1 * tensors[name].abs() for name in ("delta_bias", "dt_weight") if name in tensors}
        return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}

    def arguments(self, leaves):
        """Return the operator's arguments: the leaves, or views of them in the case's layout."""
        arguments = dict(leaves)
        for name in ("u", "delta", "B", "C", "z"):
            if name not in leaves:
                continue
            x = leaves[name]
            if self.layout == "padded":
                x = x[..., 1:-2]
            if self.layout == "transposed":
                x = x.permute(0, *range(x.dim() - 1, 0, -1))
            if self.layout == "shared_projections" and name in ("delta", "B", "C"):
                x = x.expand(-1, -1, scan_path(self.path, self.grid).num_directions, -1)
            arguments[name] = x
        return arguments

    def cotangents(self, y, last_state):
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator).to(y.dtype)
        return dy, torch.randn(last_state.shape, generator=generator)


def results(function, case, leaves, cotangents=None):
    """Return the outputs and all gradients of a call."""
    y, last_state = function(**case.arguments(leaves), **case.options())
    dy, dlast_state = cotangents or case.cotangents(y, last_state)
    outputs = {"y": y.detach(), "last_state": last_state.detach()}
    torch.autograd.backward([y, last_state], [dy.to(y), dlast_state.to(last_state)])
    return outputs | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


@cache
def expected(case, dtype=torch.float32):
    """Return the reference's results in float64, and how far it is from them in float32."""
    narrow = case.leaves(dtype)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in narrow.items()}
    single = {name: leaf.detach().float().requires_grad_() for name, leaf in narrow.items()}
    y, last_state = path_scan_reference(**case.arguments(narrow), **case.options())
    cotangents = case.cotangents(y, last_state)
    reference = results(path_scan_reference, case, wide, cotangents)
    in_float32 = results(path_scan_reference, case, single, cotangents)
    return reference, largest_errors(in_float32, reference), cotangents


def check(case, device, dtype=torch.float32):
    """Compare an implementation with the reference."""
    reference, float32_errors, cotangents = expected(case, dtype)
    actual = results(selective_scan, case, case.leaves(dtype, device), cotangents)
    assert_within_rounding(actual, reference, float32_errors, dtype, ACTIVATIONS)


ACTIVATIONS = ("y", "grad_u", "grad_delta", "grad_B", "grad_C", "grad_z")

CASES = {
    "plain": Case(),
    "one_step": Case(grid=(1,)),
    "one_step_cross": Case(path=CROSS, grid=(1, 1), z="shared"),
    "one_channel_one_state": Case(grid=(13,), channels=1, states=1),
    "cross_49_n1": Case(path=CROSS, grid=(7, 7), states=1, channels=33, rank=3),
    "cross_63_n16": Case(path=CROSS, grid=(7, 9), states=16, channels=12, rank=2, z="shared"),
    "vim_197": Case(path="h,h_flip", grid=(197,), states=16, channels=8, rank=2, z="shared", shared_u=False),
    "n2": Case(path="v,h_flip", grid=(3, 5), states=2),
    "n8": Case(path="h,v", grid=(5, 3), states=8, channels=17),
    "n64": Case(grid=(7,), states=64, channels=3),
    "three_directions": Case(path="h,v,w2", grid=(4, 6), channels=4),
    "five_directions": Case(path="h,v,h_flip,v_flip,snake_h", grid=(3, 4), channels=4),
    "six_3d": Case(path="thw,thw_flip,twh,twh_flip,wht,wht_flip", grid=(2, 3, 4), channels=4, shared_u=False),
    "eight_local": Case(path="h,h_flip,v,v_flip,w2,w2_flip,w7,w7_flip", grid=(14, 14), channels=3, states=2),
    "unmerged": Case(path=CROSS, grid=(3, 5), merge=False),
    "unmerged_gate_shared": Case(path="h,v", grid=(3, 5), merge=False, z="shared"),
    "unmerged_gate_each": Case(path="h,v", grid=(3, 5), merge=False, z="each", shared_u=False),
    "separate_inputs": Case(path=CROSS, grid=(3, 5), shared_u=False, z="shared"),
    "step_order": Case(path="snake_h,snake_h_flip,snake_v,snake_v_flip", grid=(3, 5), in_step_order=True, z="shared"),
    "step_order_low_rank": Case(path="snake_v_flip,v", grid=(4, 3), in_step_order=True, rank=2, merge=False),
    "states_in_and_out": Case(path="h,v", grid=(3, 5), initial=True),
    "states_in_one_step": Case(grid=(1,), initial=True, z="shared"),
    "bare": Case(path="h,v", grid=(3, 5), D=False, bias=False, softplus=False),
    "no_softplus": Case(path="h,v", grid=(3, 5), rank=2, softplus=False, initial=True),
    "no_skip": Case(path="h,v", grid=(3, 5), D=False, rank=2, z="shared"),
    "no_bias_low_rank": Case(path="h,v", grid=(3, 5), bias=False, rank=3),
    "class_token": Case(path="h,v,h_flip,v_flip|cls", grid=(3, 4), z="shared"),
    "windows_pad": Case(path="w7,w7_flip,h,v", grid=(9, 5), channels=3),
    "unequal_lengths": Case(path="h,w2_flip,v_flip", grid=(3, 5), merge=False, shared_u=False, initial=True),
    "sub_grids": Case(path="sub_200,subT_210,sub_201,subT_211", grid=(5, 6), z="shared", rank=2),
    "one_sub_grid": Case(path="sub_200", grid=(5, 6), merge=False),
    "padded_views": Case(path=CROSS, grid=(3, 5), rank=3, z="shared", layout="padded"),
    "padded_views_each": Case(path="h,v", grid=(3, 5), z="each", merge=False, shared_u=False, layout="padded"),
    "transposed_views": Case(path="h,v", grid=(3, 5), z="shared", layout="transposed"),
    "stride_0_along_directions": Case(path=CROSS, grid=(3, 5), rank=2, layout="shared_projections"),
    "empty_batch": Case(path="h,v", grid=(3, 5), batch=0, z="shared", rank=2, initial=True),
    "wide": Case(path="h,h_flip", grid=(3, 3), channels=130, states=16, rank=8, z="shared"),
}


class TestSmoke:
    def test_shapes_and_dtypes(self, device):
        case = Case(path=CROSS, grid=(3, 5))
        y, last_state = selective_scan(**case.leaves(device=device), **case.options())
        assert y.shape == (2, 15, 5) and y.dtype == torch.float32 and y.is_contiguous()
        assert last_state.shape == (2, 4, 5, 4) and last_state.is_contiguous()

    def test_grid_defaults_to_a_sequence(self, device):
        case = Case(path="h_flip", grid=(6,))
        leaves = case.leaves(device=device)
        y = selective_scan(**leaves, path="h_flip")[0]
        assert torch.equal(y, selective_scan(**leaves, path="h_flip", grid=[6])[0])

    def test_inputs_stay_as_they_are(self, device):
        case = CASES["states_in_and_out"]
        leaves = case.leaves(device=device)
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        results(selective_scan, case, leaves)
        assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())

    def test_is_deterministic(self, device):
        case = CASES["cross_63_n16"]
        runs = [results(selective_scan, case, case.leaves(device=device)) for _ in range(2)]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class TestAgainstReference:
    @pytest.mark.parametrize("name", CASES)
    def test_float32(self, name, device):
        check(CASES[name], device)

    @pytest.mark.parametrize("name", [name for name in CASES if name != "vim_197"])
    def test_float64(self, name, device):
        case = CASES[name]
        wide = {key: leaf.detach().double().requires_grad_() for key, leaf in case.leaves(device=device).items()}
        with skip_if_unsupported():
            actual = results(selective_scan, case, wide, expected(case)[2])
        for key, exact in expected(case)[0].items():
            torch.testing.assert_close(
                actual[key].cpu(), exact, rtol=1e-10, atol=1e-12 * (1 + float(exact.abs().sum()))
            )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    @pytest.mark.parametrize(
        "name",
        ["plain", "cross_49_n1", "cross_63_n16", "separate_inputs", "unmerged_gate_each", "step_order", "no_softplus",
         "class_token", "windows_pad", "sub_grids", "padded_views", "empty_batch", "wide"],
    )  # fmt: skip
    def test_half_precision_rounds_once(self, name, dtype, device):
        check(CASES[name], device, dtype)

    @pytest.mark.parametrize("length", [1, 7, 49, 63, 197])
    @pytest.mark.parametrize("states", [1, 2, 8, 16, 64])
    def test_odd_lengths_and_state_sizes(self, length, states, device):
        check(Case(path="h_flip", grid=(length,), batch=1, channels=3, states=states), device)

    @pytest.mark.parametrize("directions", range(1, 9))
    def test_any_number_of_directions(self, directions, device):
        names = ["h", "v", "h_flip", "v_flip", "snake_h", "snake_v", "w2", "w3"][:directions]
        check(Case(path=",".join(names), grid=(3, 4), channels=3, states=2, rank=2), device)

    def test_a_part_of_the_inputs_needs_gradients(self, device):
        case = CASES["cross_63_n16"]
        full = results(selective_scan, case, case.leaves(device=device))
        for name in case.leaves():
            leaves = {key: leaf.detach() for key, leaf in case.leaves(device=device).items()}
            leaves[name].requires_grad_()
            assert torch.equal(results(selective_scan, case, leaves)[f"grad_{name}"], full[f"grad_{name}"])

    @pytest.mark.parametrize("output", [0, 1])
    def test_gradient_of_one_output(self, output, device):
        case = CASES["states_in_and_out"]
        gradients = []
        for function, dtype, place in (
            (selective_scan, torch.float32, device),
            (path_scan_reference, torch.float64, "cpu"),
        ):
            leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in case.leaves(device=place).items()}
            function(**leaves, **case.options())[output].square().sum().backward()
            gradients.append({name: x.grad if x.grad is None else x.grad.cpu().double() for name, x in leaves.items()})
        for name, exact in gradients[1].items():
            exact = torch.zeros_like(gradients[0][name]) if exact is None else exact
            torch.testing.assert_close(gradients[0][name], exact, rtol=1e-5, atol=1e-5)

    def test_states_join_the_parts_of_a_sequence(self, device):
        case = Case(grid=(12,))
        leaves = case.leaves(device=device)
        whole, last_state = selective_scan(**leaves)
        state, parts = None, []
        for start, stop in ((0, 1), (1, 8), (8, 12)):
            part = {name: leaves[name][:, start:stop] for name in ("u", "delta", "B", "C")}
            y, state = selective_scan(**(leaves | part), initial_state=state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state, last_state, rtol=1e-5, atol=1e-6)


class TestBlocksOfSteps:
    """The PyTorch fallback walks long paths in blocks of steps, which hand their states on."""

    @pytest.mark.parametrize("by_steps", [False, True])
    @pytest.mark.parametrize("elements", [1, 300, 1000, 1 << 22])
    @pytest.mark.parametrize("name", ["cross_63_n16", "step_order", "unequal_lengths", "states_in_and_out"])
    def test_blocks_of_any_length(self, name, elements, by_steps, monkeypatch):
        monkeypatch.setattr(pytorch, "_BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(pytorch, "_STEP_ELEMENTS", 1 if by_steps else 1 << 30)
        with backend("torch"):
            check(CASES[name], "cpu")


class TestExtremes:
    @pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 20.0, 21.0, 90.0, 1e4])
    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("decay", [1e-6, 1.0, 1e4])
    def test_step_sizes(self, magnitude, sign, decay, device):
        case = Case(path="h,h_flip", grid=(9,), D=False, bias=False, z="shared")
        self.compare(case, device, delta=lambda x: sign * magnitude * (1 + 0.1 * x.tanh()), A=lambda x: decay * x)

    def test_gates(self, device):
        case = Case(path="h,h_flip", grid=(9,), z="shared")
        self.compare(case, device, z=lambda x: 200 * x)

    def test_no_decay(self, device):
        case = Case(path="h,h_flip", grid=(33,))
        self.compare(case, device, A=torch.zeros_like)

    @staticmethod
    def compare(case, device, **changes):
        found = []
        for function, dtype, place in (
            (selective_scan, torch.float32, device),
            (path_scan_reference, torch.float64, "cpu"),
        ):
            leaves = {name: x.detach() for name, x in case.leaves().items()}
            leaves |= {name: change(leaves[name]) for name, change in changes.items()}
            leaves = {name: x.to(place, dtype).requires_grad_() for name, x in leaves.items()}
            found.append(results(function, case, leaves, (torch.ones(2, case.grid[0], 5), torch.ones(2, 2, 5, 4))))
        for name, exact in found[1].items():
            value = found[0][name].cpu().double()
            assert exact.isfinite().all() and value.isfinite().all(), name
            tiny = torch.finfo(torch.float32).tiny * 1e3
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()) + tiny, msg=name)


class TestGradients:
    @pytest.mark.parametrize(
        "case",
        [
            Case(path="h,v", grid=(2, 2), channels=2, states=2, rank=1, z="shared", initial=True),
            Case(path="v", grid=(2, 2), channels=2, states=2, z="each", merge=False, shared_u=False, softplus=False),
            Case(path="snake_h_flip", grid=(2, 2), channels=2, states=1, in_step_order=True),
        ],
        ids=["merged", "unmerged", "step_order"],
    )
    def test_gradcheck(self, case, device):
        leaves = {name: x.detach().double() for name, x in replace(case, batch=1).leaves(device=device).items()}
        names = list(leaves)

        def function(*tensors):
            return selective_scan(**dict(zip(names, tensors, strict=True)), **case.options())

        with skip_if_unsupported():
            function(*leaves.values())
        assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in leaves.values()))


def operator_arguments(case, leaves):
    arguments = case.arguments(leaves)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "dt_weight", "initial_state")
    return (
        *(arguments.get(name) for name in names), case.path, list(case.grid), case.softplus, case.merge,
        case.in_step_order,
    )  # fmt: skip


class Scan(torch.nn.Module):
    """A tiny block around the operator, as models use it."""

    def __init__(self, channels=4, states=2, path=CROSS):
        super().__init__()
        self.path, self.directions = path, path.count(",") + 1
        self.sizes = [channels, states, states]
        self.in_proj = torch.nn.Linear(channels, self.directions * sum(self.sizes))
        self.A = torch.nn.Parameter(-torch.rand(self.directions, channels, states))

    def forward(self, x):
        height, width = x.shape[1], x.shape[2]
        tokens = x.flatten(1, 2)
        delta, B, C = self.in_proj(tokens).unflatten(2, (self.directions, sum(self.sizes))).split(self.sizes, 3)
        y, _ = selective_scan(tokens, delta, self.A, B, C, z=tokens, path=self.path, grid=[height, width])
        return y.view(x.shape)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Scan(), torch.randn(2, 3, 5, 4)


class TestCompile:
    @pytest.mark.parametrize("name", ["cross_63_n16", "unmerged_gate_each", "states_in_and_out"])
    def test_opcheck(self, name, device):
        case = replace(CASES[name], channels=3, states=2)
        arguments = operator_arguments(case, case.leaves(device=device))
        torch.library.opcheck(torch.ops.visionmamba.selective_scan.default, arguments)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        y, last_state = torch.ops.visionmamba.selective_scan(*detached)
        for dlast_state in (None, last_state):
            torch.library.opcheck(
                torch.ops.visionmamba.selective_scan_backward.default, (y, dlast_state, *detached),
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
    def test_torchscript(self, block, tmp_path):
        block, x = block
        for scripted in (torch.jit.script(block), torch.jit.trace(block, x)):
            assert_same_training_step(scripted, block, x)
            scripted.save(str(tmp_path / "scripted.pt"))
            torch.testing.assert_close(torch.jit.load(str(tmp_path / "scripted.pt"))(x), block(x))

    def test_meta_device(self):
        case = CASES["unequal_lengths"]
        leaves = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in case.leaves().items()}
        y, last_state = selective_scan(**leaves, **case.options())
        real, real_state = selective_scan(**case.leaves(), **case.options())
        assert (y.device.type, y.shape, y.dtype) == ("meta", real.shape, real.dtype)
        assert (last_state.shape, last_state.dtype) == (real_state.shape, real_state.dtype)
        y.sum().backward()
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_autocast(self, dtype, device):
        torch.manual_seed(0)
        block, x = Scan().to(device), torch.randn(2, 3, 5, 4, device=device)
        exact = block(x).detach()
        with torch.autocast(device, dtype):
            y = block(x)
            y.float().sum().backward()  # inside, too: autocast must not reach into the backward op
        assert y.dtype == dtype and block.A.grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.02 * float(exact.abs().max()))

    def test_autocast_leaves_float32_activations_alone(self, device):
        case = CASES["cross_63_n16"]
        plain = results(selective_scan, case, case.leaves(device=device))
        with torch.autocast(device, torch.bfloat16):
            inside = results(selective_scan, case, case.leaves(device=device))
        assert all(torch.equal(inside[name], plain[name]) for name in plain)


class TestFlops:
    def test_field_convention(self):
        # Vim-T: 9 B L D N + B L D for each of two directions, and the dt projection as 2 operations a MAC
        case = Case(path="h,h_flip", grid=(197,), batch=3, channels=384, states=16, rank=12)
        scan = 2 * 3 * 197 * 384 * (9 * 16 + 1)
        projection = 2 * 2 * 3 * 197 * 384 * 12
        leaves = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in case.leaves().items()}
        with FlopCounterMode(display=False) as counter:
            y, _ = selective_scan(**leaves, **case.options())
        assert counter.get_total_flops() == scan + projection
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * (scan + projection)
        assert flops.scan_flops(leaves["u"], leaves["A"]) == scan
        assert flops.dt_projection_macs(leaves["u"], leaves["delta"], leaves["A"]) == projection // 2

    def test_full_rank_delta_costs_no_projection(self):
        leaves = Case().leaves()
        with FlopCounterMode(display=False) as counter:
            selective_scan(**leaves)
        assert counter.get_total_flops() == 2 * 7 * 5 * (9 * 4 + 1)
        assert flops.dt_projection_macs(leaves["u"].shape, leaves["delta"].shape, leaves["A"].shape) == 0

    def test_recurrence_as_written(self):
        assert flops.recurrence_flops((2, 7, 5), (3, 5, 4)) == 2 * 7 * 3 * 5 * (7 * 4 + 3)


class TestErrors:
    CASE = Case(path="h,v", grid=(3, 5), rank=2, z="shared", initial=True)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"u": (2, 15)}, ValueError, r"u: expected \(B, L, D\) or \(B, L, K, D\), got shape \(2, 15\)"),
            ({"u": (2, 15, 6)}, ValueError, r"u: expected shape \(2, 15, 5\), got \(2, 15, 6\)"),
            ({"u": (2, 15, 3, 5)}, ValueError, r"u: expected shape \(2, 15, 2, 5\), got \(2, 15, 3, 5\)"),
            ({"A": (5, 4)}, ValueError, r"A: expected \(K, D, N\), got shape \(5, 4\)"),
            ({"delta": (2, 15, 2, 3)}, ValueError, r"delta: expected shape \(2, 15, 2, 2\), got \(2, 15, 2, 3\)"),
            ({"dt_weight": (2, 5)}, ValueError, r"dt_weight: expected \(K, D, R\), got shape \(2, 5\)"),
            ({"dt_weight": (2, 4, 2)}, ValueError, r"dt_weight: expected shape \(2, 5, 2\), got \(2, 4, 2\)"),
            ({"B": (2, 15, 4)}, ValueError, r"B: expected shape \(2, 15, 2, 4\), got \(2, 15, 4\)"),
            ({"C": (2, 15, 2, 5)}, ValueError, r"C: expected shape \(2, 15, 2, 4\), got \(2, 15, 2, 5\)"),
            ({"D": (5,)}, ValueError, r"D: expected shape \(2, 5\), got \(5,\)"),
            ({"delta_bias": (10,)}, ValueError, r"delta_bias: expected shape \(2, 5\), got \(10,\)"),
            ({"z": (2, 15, 2, 5)}, ValueError, r"z: expected shape \(2, 15, 5\), got \(2, 15, 2, 5\)"),
            (
                {"initial_state": (2, 5, 4)},
                ValueError,
                r"initial_state: expected shape \(2, 2, 5, 4\), got \(2, 5, 4\)",
            ),
            ({"u": torch.int32}, TypeError, "u: expected dtype float32 or float16 or bfloat16 or float64, got int32"),
            ({"B": torch.bfloat16}, TypeError, "B: expected dtype float32, got bfloat16"),
            ({"z": torch.float64}, TypeError, "z: expected dtype float32, got float64"),
            ({"A": torch.complex64}, TypeError, "A: expected dtype .*, got complex64"),
            ({"D": torch.int64}, TypeError, "D: expected dtype .*, got int64"),
            ({"C": "meta"}, ValueError, r"C: expected device cpu \(that of u\), got meta"),
            ({"path": "h"}, ValueError, "path: 'h' has 1 directions, but A has 2"),
            ({"path": "h,diagonal"}, ValueError, "path: unknown direction 'diagonal'"),
            ({"path": "h,thw"}, ValueError, r"grid: direction 'thw' expects 3 axes, got \(3, 5\)"),
            ({"grid": [4, 5]}, ValueError, r"grid: path 'h,v' over \(4, 5\) needs 20 tokens in memory, but u has 15"),
            ({"path": "h,w2"}, ValueError, r"grid: path 'h,w2' over \(3, 5\) needs 24 tokens in memory, but u has 15"),
            ({"grid": [3, 0]}, ValueError, r"grid: expected positive sizes, got \(3, 0\)"),
        ],
    )
    def test_bad_argument_is_named(self, change, error, message):
        arguments = {name: leaf.detach() for name, leaf in self.CASE.leaves().items()} | self.CASE.options()
        for name, value in change.items():
            if isinstance(value, tuple):
                value = torch.ones(value)
            elif isinstance(value, torch.dtype) or value == "meta":
                value = arguments[name].to(value)
            arguments[name] = value
        with pytest.raises(error, match=message):
            selective_scan(**arguments)

    def test_absent_grid_of_a_two_dimensional_path(self):
        case = Case(path="v", grid=(3, 5))
        with pytest.raises(ValueError, match=r"grid: direction 'v' expects \(rows, columns\), got \(15,\)"):
            selective_scan(**case.leaves(), path="v")

    def test_unsupported_backend(self):
        with backend("cuda"), pytest.raises(RuntimeError, match="selective_scan: backend 'cuda' was asked for"):
            selective_scan(**Case().leaves())
