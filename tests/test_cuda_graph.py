"""Inference as a CUDA graph."""

import pytest
import timm
import torch

import visionmamba


def test_needs_a_gpu_and_evaluation_mode():
    model = timm.create_model("test_vim").eval()
    with pytest.raises(ValueError, match="example: a CUDA graph needs a tensor on a CUDA device, got one on cpu"):
        visionmamba.graph(model, torch.randn(1, 3, 64, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replays_what_the_model_computes(name, dtype):
    torch.manual_seed(0)
    model = timm.create_model(name).cuda().eval()
    x, other = torch.randn(2, 4, *model.default_cfg["input_size"], device="cuda")
    with pytest.raises(ValueError, match="evaluation mode"):
        visionmamba.graph(model.train(), x)
    graphed = visionmamba.graph(model.eval(), x, dtype)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is not None):
        first, second, third = model(x), model(other), model(other[:3])
    found = graphed(x), graphed(other), graphed(other[:3])
    for actual, expected in zip(found, (first, second, third), strict=True):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        model.head.weight.mul_(2) if name == "test_vim" else model.head.fc.weight.mul_(2)
    assert not torch.equal(graphed(x), first)
