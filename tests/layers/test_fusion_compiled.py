"""Compiled models run the fused operators, exported ones the separate operators."""

import pytest
import timm
import torch
import torch.nn as nn
from torch._dynamo.backends.registry import lookup_backend

import visionmamba  # noqa: F401
from visionmamba.layers import (
    disjoint_patches,
    fusion,
    gated_mixer,
    joined_blocks,
    mlp,
    norm,
    recompute,
    selective_ssm,
    ss2d,
)
from visionmamba.layers import residual_stream as stream

MODULES = (disjoint_patches, gated_mixer, joined_blocks, mlp, norm, recompute, selective_ssm, ss2d, stream)
FUSED = {
    "test_vmamba": ({"ssm"}, {"channel_norm", "ssm"}),
    "test_efficient_vmamba": (set(), {"channel_norm"}),
    "test_local_vmamba": ({"ssm"}, {"channel_norm", "ssm"}),
    "test_plainmamba": (set(), {"channel_norm"}),
    "test_mamba2d": ({"ssm"}, {"channel_norm", "ssm"}),
    "test_vim": ({"ssm"}, {"ssm"}),  # the compiler joins Vim's norms with the additions before them
}
"""Fused operators of compiled models in training, and in inference."""


def _compiled(model):
    """Return a model compiled whole, and the list that its graphs will be in."""
    torch._dynamo.reset()  # models share code, which is compiled a limited number of times
    graphs, aot_eager = [], lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def _results(run, model, x):
    """Return the output and the parameters' gradients."""
    y = run(x)
    loss = y.float().square().mean()
    return y, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def _check_operators(name, graphs):
    fused = {"channel_norm", "gelu_linear", "ssm"}
    for graph, expected in zip(graphs, FUSED[name], strict=True):
        targets = [node.target for node in graph.graph.nodes if "visionmamba." in str(node.target)]
        assert {target.__name__.split(".")[0] for target in targets} & fused == expected


@pytest.mark.parametrize("name", FUSED)
def test_a_compiled_model_is_the_eager_one(name, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "fuses", lambda _x, compiled=True: compiled and torch.compiler.is_compiling())
    torch.manual_seed(0)
    model, x = timm.create_model(name), torch.randn(2, 3, 64, 64)
    compiled, graphs = _compiled(model)
    for found, expected in zip(_results(compiled, model, x), _results(model, model, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    _check_operators(name, graphs)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", FUSED)
def test_on_a_gpu(name, autocast):
    torch.manual_seed(0)
    model, x = timm.create_model(name).cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    compiled, graphs = _compiled(model)

    def outcomes(run, autocast, together):
        """Return the output, what is inferred, and the gradients, as one or each by itself."""
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.backends.cudnn.flags(allow_tf32=False):
            output, *gradients = _results(run, model, x)
            with torch.no_grad():
                gradients = [torch.cat([gradient.flatten() for gradient in gradients])] if together else gradients
                return output, run(x), *gradients

    found, eager = outcomes(compiled, autocast, autocast), outcomes(model, autocast, autocast)
    if autocast:
        # A batch norm over few pixels makes much of rounding, of which the gradient of a bias before it is all: the
        # measure is the eager model's own distance from float32, of all gradients together.
        for actual, expected, exact in zip(found, eager, outcomes(model, False, True), strict=True):
            distance, own = ((x - exact).float().norm() for x in (actual, expected))
            assert distance <= 2 * own + 1e-3 * exact.norm()
    else:
        for actual, expected in zip(found, eager, strict=True):
            assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-6
    _check_operators(name, graphs)


class _Tells(nn.Module):
    def forward(self, x):
        return x + 1 if fusion._is_exporting() else x - 1


def test_compiling_is_not_exporting():
    x, tells = torch.ones(2), _Tells()
    assert torch.equal(torch.compile(tells, backend="eager", fullgraph=True)(x), x - 1)
    for strict in (False, True):
        assert torch.equal(torch.export.export(tells, (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(tells(x), x - 1)
