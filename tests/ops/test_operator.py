"""How operators are registered: gradients of gradients refuse, torch.compile and autograd treat them as any other."""

import pytest
import torch

from visionmamba.ops import causal_conv1d, selective_scan
from visionmamba.ops._operator import _formulas
from visionmamba.ops.channel_norm import channel_norm


def _norm(x, weight):
    return channel_norm(x, weight)[0]


def _convolution(x, weight):
    return causal_conv1d(x, weight[None, :, None].expand(1, 8, 4))[0]


def _scan(x, weight):
    rows = x[..., :2].unsqueeze(2)
    return selective_scan(x, x.unsqueeze(2), -weight.exp()[None, :, None].expand(1, 8, 2), rows, rows)[0]


@pytest.mark.parametrize("function", [_norm, _convolution, _scan])
def test_second_derivatives_are_refused(function):
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"visionmamba::\w+_backward has no gradient"):
        gradient.sum().backward()


def test_every_gradient_is_registered():
    assert len(_formulas) > 12
    for name, formula in _formulas.items():
        has_gradient = name != "scan_moves" and not name.endswith("_backward")
        assert (formula.backward is not None) == has_gradient == (formula.setup_context is not None), name


def test_no_gradient_is_recorded_where_none_is_asked_for():
    x, weight = torch.randn(2, 5, 8), torch.randn(8, requires_grad=True)
    assert _norm(x, weight).requires_grad
    assert not _norm(x, weight.detach()).requires_grad
    with torch.no_grad():
        assert not _norm(x, weight).requires_grad


def test_compile_does_not_look_inside():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    compiled = torch.compile(lambda x: _norm(x, weight) + 1, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x), _norm(x, weight) + 1)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("visionmamba.channel_norm" in target for target in targets)
    assert len(graphs) == 1
