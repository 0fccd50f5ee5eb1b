"""Inference and training as CUDA graphs."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from _graph_stand_in import GraphStandIn

import visionmamba
from visionmamba import cuda_graph
from visionmamba.cuda_graph import graph_training


def test_needs_a_gpu_and_evaluation_mode():
    model = timm.create_model("test_vim").eval()
    with pytest.raises(ValueError, match="example: a CUDA graph needs a tensor on a CUDA device, got one on cpu"):
        visionmamba.graph(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="example: a CUDA graph needs a tensor on a CUDA device, got one on cpu"):
        graph_training(model.train(), torch.randn(1, 3, 64, 64))
    assert "forward" not in vars(model)


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


class Net(nn.Module):
    """Statistics that move, random numbers, two names of one weight, and a weight that nothing uses."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.leave.weight = self.enter.weight
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.leave(F.dropout(self.norm(self.enter(x)), 0.5, self.training))


def _pair(device="cpu"):
    torch.manual_seed(0)
    models = Net().to(device), Net().to(device)
    models[1].load_state_dict(models[0].state_dict())
    return *models, torch.randn(6, 8, 4, device=device)


def _same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.grad is None if its.grad is None else torch.equal(mine.grad, its.grad)


def _accumulate(model, batches):
    """Add up the gradients of passes, each with its own random numbers."""
    outputs = []
    for seed, x in enumerate(batches):
        torch.manual_seed(seed)
        outputs.append(model(x).clone())
        outputs[-1].square().mean().backward()
    return outputs


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_capture", found := GraphStandIn())
    return found


def test_a_capture_leaves_everything_as_it_was(stand_in):
    model, other, batches = _pair()
    parameters, state = dict(model.named_parameters()), torch.get_rng_state()
    graph_training(model, batches[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.leave.weight is model.enter.weight
    _same(model, other)


def test_gradients_of_replays_add_up(stand_in):
    model, other, batches = _pair()
    graph_training(model, batches[0])
    for _ in range(2):
        outputs, expected = _accumulate(model, batches), _accumulate(other, batches)
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
        _same(model, other)
        model.zero_grad()
        other.zero_grad()
    assert stand_in.replays == 12


def test_copies_and_captures_anew(stand_in):
    model, other, batches = _pair()
    graph_training(model, batches[0])
    average, x = copy.deepcopy(model), batches[1]
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    model.eval(), average.eval(), other.eval()
    assert average(x).count_nonzero() == 0
    assert torch.equal(model(x), other(x))
    assert stand_in.replays == 0
    model.train(), other.train()
    graph_training(model, batches[0])
    assert stand_in.replays == 0
    found, expected = _accumulate(model, batches), _accumulate(other, batches)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    _same(model, other)
    assert stand_in.replays == len(batches)


def test_what_is_unlike_the_example_runs_as_it_stands(stand_in):
    model, other, (x, *batches) = _pair()
    graph_training(model, x)
    _accumulate(model, [*batches, x[:3]])
    _accumulate(other, [*batches, x[:3]])
    assert stand_in.replays == 5
    for change in (model.eval, lambda: model.train() and model.norm.requires_grad_(False)):
        change()
        model(x).sum().backward()
    model.norm.requires_grad_(True)
    with torch.no_grad():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    y = x.clone().requires_grad_()
    model(y).sum().backward()
    assert y.grad.abs().sum() > 0
    assert stand_in.replays == 5
    model(x)
    assert stand_in.replays == 6


@pytest.mark.gpu
def test_a_graph_draws_the_models_random_numbers(monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    model, other, batches = _pair("cuda")
    state = torch.cuda.get_rng_state()
    graph_training(model, batches[0])
    assert torch.equal(torch.cuda.get_rng_state(), state)
    _same(model, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that gradients wait for another stream
        outputs = _accumulate(model, batches)
    assert len(replays) == 12  # forward and backward
    for actual, expected in zip(outputs, _accumulate(other, batches), strict=True):
        torch.testing.assert_close(actual, expected)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    torch.testing.assert_close(model.norm.running_mean, other.norm.running_mean)
    first, second = (model(batches[0]).clone() for _ in range(2))  # without a seed between them
    assert not torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_plainmamba", "test_efficient_vmamba"])
def test_training_replays_what_the_model_computes(name, dtype):
    models = [timm.create_model(name, drop_path_rate=0.3).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = torch.randn(4, 4, *models[0].default_cfg["input_size"], device="cuda")
    results = []
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is not None):
        graph_training(models[0], batches[0])
        for model in models:
            outputs = _accumulate(model, batches)
            results.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    scale = 2e-2 if dtype else 1e-4
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=scale, atol=scale * expected.abs().max().item() + 1e-8)
