"""Exported files give the model's own outputs, for any batch, and need this package only where they say so."""

import pytest
import timm
import torch

from visionmamba.export import (
    FORMATS,
    ExportError,
    Mismatch,
    compare_with_eager,
    export_model,
    exporter,
    missing_requirement,
)
from visionmamba.inference import input_size
from visionmamba.ops import causal_conv1d, selective_scan
from visionmamba.ops.ssd import ssd_scan

FAMILIES = (
    "test_vim", "test_vmamba", "test_plainmamba", "test_local_vim", "test_local_vmamba", "test_efficient_vmamba",
    "test_mamba2d", "test_mamba3d",
)  # fmt: skip
OPERATORS = "visionmamba::"


standard_operators = pytest.mark.skipif(
    torch.__version__ < exporter._STANDARD_TORCH, reason=f"needs PyTorch {exporter._STANDARD_TORCH}"
)


def _needs(format):
    missing = missing_requirement(format)
    if missing:
        pytest.skip(missing)


@torch.no_grad()
def _model(name):
    """Create a model with weights whose outputs are of the order of 1 and depend on the image."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter[0].numel() ** -0.5)
    return model


def _sizes(model):
    """The model's own size, a larger one and one that is not square."""
    *front, height, width = input_size(model)
    return [(*front, height, width), (*front, height + 32, width + 32), (*front, height, width + 32)]


def _check(name, format, sizes, folder, batches=(1, 3)):
    _needs(format)
    model, path = _model(name), folder / f"model{FORMATS[format]}"
    for shape in _sizes(model)[:sizes]:
        model.set_input_size(img_size=shape[-2:])
        export_model(model, path, format, shape)
        difference = compare_with_eager(model, path, format, shape, batches)
        size, mebibytes = "x".join(map(str, shape)), path.stat().st_size / 2**20
        print(f"| {format} | {name} | {size} | {difference:.1e} | {mebibytes:.2f} |")
        assert difference <= 1e-4
    return path


def test_onnx_holds_standard_operators_and_no_paths_of_this_machine(tmp_path):
    path = _check("test_vim", "onnx", 1, tmp_path)
    import onnx

    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    assert sum(node.op_type == "Scan" for node in graph.node) == len(_model("test_vim").blocks)
    assert b".py" not in path.read_bytes()


@pytest.mark.parametrize("name", ["test_vmamba", "test_mamba3d"])
def test_pt2(name, tmp_path):
    _check(name, "pt2", 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_three_sizes(name, format, tmp_path):
    _check(name, format, 3, tmp_path)


@pytest.mark.slow
def test_onnx_of_a_model_on_mamba2(tmp_path):
    _needs("onnx")
    torch.manual_seed(0)
    model, path = timm.create_model("vmamba_tiny_m2").eval(), tmp_path / "m2.onnx"
    export_model(model, path, "onnx", (3, 32, 32))
    compare_with_eager(model, path, "onnx", (3, 32, 32), (2,))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_aoti_three_sizes(name, tmp_path):
    _check(name, "aoti", 3, tmp_path, batches=(1,))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_model_exports():
    """``torch.export`` takes every model of the zoo, on the meta device."""
    from visionmamba.zoo import model_names

    failed = {}
    for name in model_names():
        try:
            model = timm.create_model(name, device="meta").eval()
        except ImportError:
            continue
        x = torch.zeros(2, *input_size(model), device="meta")
        try:
            program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
            assert OPERATORS.strip(":") in program.graph_module.code
        except Exception as error:
            failed[name] = str(error)[:300]
    assert not failed


class _Ops(torch.nn.Module):
    """The operators with what no micro model combines: paths of unequal length, states, projections in step order."""

    def __init__(self, path, grid, **options):
        super().__init__()
        self.path, self.grid, self.options = path, grid, options
        directions = path.count(",") + 1
        self.A = torch.nn.Parameter(-torch.rand(directions, 3, 2))
        self.weight = torch.nn.Parameter(torch.randn(directions, 3, 4))

    def forward(self, x):
        directions = self.A.shape[0]
        u, conv_state = causal_conv1d(x, self.weight, path=self.path, grid=self.grid)
        delta = u - 1
        B, C = u[..., :2].sin(), u[..., 1:].cos()
        state = self.A.expand(x.shape[0], directions, 3, 2)
        y, last = selective_scan(
            u, delta, self.A, B, C, initial_state=state, path=self.path, grid=self.grid, **self.options
        )
        return torch.cat([y.flatten(1), last.flatten(1), conv_state.flatten(1)], dim=1)


@standard_operators
@pytest.mark.parametrize(
    ("path", "grid", "options"),
    [
        ("sub_200,subT_210,sub_201_flip", (4, 6), {}),
        ("h,w2", (3, 5), {"merge": False}),
        ("h,v_flip", (3, 4), {"projections_in_step_order": True}),
    ],
)
def test_standard_operators_equal_the_operators(path, grid, options):
    from visionmamba.export.standard_ops import standard_ops
    from visionmamba.ops.scan_path import scan_path

    torch.manual_seed(0)
    model = _Ops(path, list(grid), **options)
    x = torch.randn(2, scan_path(path, grid).num_tokens, 3)
    program = torch.export.export(model, (x,), strict=False).run_decompositions(standard_ops())
    assert OPERATORS.strip(":") not in program.graph_module.code
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


class _Ssd(torch.nn.Module):
    """Mamba-2's scan with groups, a skip a channel, limits and a state."""

    def __init__(self, merge, heads=4):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(2, heads))
        self.D = torch.nn.Parameter(torch.rand(2, heads, 3))
        self.merge, self.heads = merge, heads

    def forward(self, x):
        x = x[:, :, : self.heads]
        each = x.unsqueeze(2).expand(-1, -1, 2, -1, -1)
        B, C = each[..., :2, :].sin(), each[..., 2:4, :].cos()
        state = self.A[:, :, None, None].expand(x.shape[0], 2, self.heads, 3, 3)
        y, last = ssd_scan(
            x, each[..., 0], self.A, B, C, self.D, x if self.merge else each, self.A, state,
            path="h,w2", grid=[3, 5], dt_limit=(0.1, 1.0), merge=self.merge,
        )  # fmt: skip
        return torch.cat([y.flatten(1), last.flatten(1)], dim=1)


@standard_operators
@pytest.mark.parametrize("merge", [True, False])
def test_standard_ssd_equals_the_operator(merge):
    from visionmamba.export.standard_ops import standard_ops

    torch.manual_seed(0)
    model, x = _Ssd(merge), torch.randn(2, 24, 4, 3)
    program = torch.export.export(model, (x,), strict=False).run_decompositions(standard_ops())
    assert OPERATORS.strip(":") not in program.graph_module.code
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


class _TwoSsd(torch.nn.Module):
    """Two of them with other numbers of heads, as in the stages of a model."""

    def __init__(self):
        super().__init__()
        self.one, self.two = _Ssd(True, 4), _Ssd(True, 8)

    def forward(self, x):
        return torch.cat([self.one(x), self.two(x)], dim=1)


@standard_operators
def test_the_loops_of_different_layers_take_no_numbers(tmp_path):
    from visionmamba.export.standard_ops import standard_ops

    x = torch.randn(2, 24, 8, 3)
    program = torch.export.export(_TwoSsd(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    program = program.run_decompositions(standard_ops())
    loops = [node for node in program.graph.nodes if node.target is torch.ops.higher_order.scan]
    assert len(loops) == 2
    assert not [value for node in loops for value in node.args[3] if not isinstance(value, torch.fx.Node)]


def test_mismatch_is_found(tmp_path):
    model, path = _model("test_mamba2d"), tmp_path / "model.pt2"
    export_model(model, path, "pt2", input_size(model))
    model.head.bias.data.add_(1e-2)
    with pytest.raises(Mismatch, match="differs from the model"):
        compare_with_eager(model, path, "pt2", input_size(model))


def test_without_a_compiler(monkeypatch, tmp_path):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    model = _model("test_mamba2d")
    with pytest.raises(ExportError, match=r"C\+\+ compiler"):
        export_model(model, tmp_path / "x", "aoti", input_size(model))


def test_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.torch.export, "save", fail)
    model = _model("test_mamba2d")
    with pytest.raises(OSError, match=r"No space left on device: .*model\.pt2"):
        export_model(model, tmp_path / "model.pt2", "pt2", input_size(model))
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format: expected one of onnx, pt2, aoti, got 'tf'"):
        export_model(_model("test_mamba2d"), tmp_path / "x", "tf", (3, 64, 64))
