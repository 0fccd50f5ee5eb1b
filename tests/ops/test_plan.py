"""Plans of operators' calls: the same results as the function, without it once a signature has come a few times."""

import importlib
import os
import subprocess
import sys
import weakref
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from visionmamba.ops._plan import Plans
from visionmamba.ops.backend import Implementation, register_implementation, select
from visionmamba.ops.cuda_runtime import KernelError

plans_module = importlib.import_module("visionmamba.ops._plan")
registry = importlib.import_module("visionmamba.ops.backend")


@pytest.fixture(autouse=True)
def _watch_the_second_call(monkeypatch):
    monkeypatch.setattr(plans_module, "UNWATCHED", 1)


def counted(function, others=None):
    """Return a function's plans, and how often it was called."""
    calls = []

    def spied(*inputs):
        calls.append(inputs)
        return function(*inputs)

    return Plans(spied, others or {}), calls


def check(function, draw, rounds=5, planned=True):
    """Compare a function with its plans for inputs that are new each time."""
    plans, calls = counted(function)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(rounds):
            inputs = draw()
            expected = function(*inputs)
            found = plans(*inputs)
            assert isinstance(found, torch.Tensor) == isinstance(expected, torch.Tensor)
            if isinstance(found, torch.Tensor):
                found, expected = (found,), (expected,)
            assert len(found) == len(expected)
            for x, y in zip(found, expected, strict=True):
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
                assert torch.equal(x, y)
    assert len(calls) == 2 if planned else len(calls) >= rounds
    return plans


@cache
def table(rows):
    return torch.arange(rows).flip(0)


def composite(x, weight, bias, path, sizes):
    """Compute something of views, casts, products, lists of results, writes into views, and cached tensors."""
    y = F.linear(F.silu(x), weight.to(x.dtype), bias)
    left, right = y.chunk(2, dim=-1)
    joined = torch.cat([right, left.flip(0)], dim=-1)
    joined.flatten(1)[:, 1:].addmm_(joined.flatten(1).clone(), torch.ones(joined[0].numel(), joined[0].numel() - 1))
    largest, places = joined.max(dim=-1)
    filled = torch.zeros(sizes)
    filled[: x.shape[0]] = joined[:, 0, : sizes[1]]
    values = torch.empty_like(joined).copy_(joined).transpose(0, 1)
    return values, largest.view(-1).index_select(0, table(largest.numel())), places, filled, y[1:, :, 1:]


def draw_composite():
    return torch.randn(3, 4, 6), torch.randn(8, 6, dtype=torch.float64), torch.randn(8), "h", [5, 3]


def test_anything_of_pytorchs_operators():
    check(composite, draw_composite)


def test_a_signature_is_watched_once_it_has_come_often_enough(monkeypatch):
    monkeypatch.setattr(plans_module, "UNWATCHED", 4)
    plans, calls = counted(lambda x: x + 1)
    for _ in range(9):
        plans(torch.randn(3))
    assert len(calls) == 5


def test_one_result():
    check(lambda x, y: (x @ y.T).softmax(-1).sum(0), lambda: (torch.randn(3, 4), torch.randn(5, 4)))


def test_an_operator_with_a_kernel_of_its_own_stays_whole():
    # its composite form, which autograd has for it elsewhere, rounds each step to bfloat16
    check(torch.ops.aten.silu_backward, lambda: tuple(torch.randn(2, 64).bfloat16()))


def test_views_at_an_offset_of_a_view_given():
    def inputs():
        offset = int(torch.randint(0, 3, ())) * 16
        return (torch.randn(200)[offset : offset + 96].view(8, 12),)

    check(lambda x: (x[2:, 3:].T + 1, x[1:, 4::2] * x[:-1, 5::2]), inputs)


def test_a_tensor_given_twice_is_two():
    plans, calls = counted(lambda x, y: x - 2 * y)
    x, y, same = (torch.randn(5) for _ in range(3))
    for _ in range(2):
        assert torch.equal(plans(same, same), -same)
    assert torch.equal(plans(x, y), x - 2 * y)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, option: (x[:3], w, option),
        lambda x, w, option: (x.T.contiguous().T, w, option),
        lambda x, w, option: (x.double(), w, option),
        lambda x, w, option: (torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape), w, option),
        lambda x, w, option: (x, None, option),
        lambda x, w, option: (x, w, [3]),
    ],
    ids=["shape", "strides", "dtype", "alignment", "absent", "option"],
)
def test_another_signature_is_planned_anew(change):
    plans, calls = counted(lambda x, w, option: x * option[0] if w is None else x * w)
    arguments = torch.randn(4, 4), torch.randn(4), [2]
    for _ in range(3):
        plans(*arguments)
    assert len(calls) == 2
    plans(*change(*arguments))
    assert len(calls) == 3


def test_another_choice_of_backend_is_planned_anew(monkeypatch):
    plans, calls = counted(lambda x: x + 1)
    x = torch.randn(3)
    for _ in range(3):
        plans(x)
    with registry.backend("torch"):
        plans(x)
    assert len(calls) == 3
    monkeypatch.setitem(registry._failed, ("op", "cuda"), "failed")
    plans(x)
    assert len(calls) == 4


def test_memory_is_given_back_as_soon_as_nothing_reads_it():
    class Alive(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.append(weakref.ref(result))
            alive.append(sum(ref() is not None for ref in made))
            return result

    def function(x):
        for _ in range(6):
            x = x.sin()
        return x

    plans, _ = counted(function)
    x, made, alive = torch.randn(3), [], []
    for _ in range(2):
        plans(x)
    with Alive():
        plans(x)
    assert len(alive) == 6
    assert max(alive) == 2


def test_what_nothing_reads_is_left_out():
    def function(x):
        x.view(-1)[1:], torch.empty(1000), x.new_empty(3)
        return x + 1

    names = check(function, lambda: (torch.randn(4, 2),))._plans
    (plan,) = names.values()
    assert plan.__code__.co_varnames[1:] == ("t4",)


def test_values_that_are_read_back_are_not_planned():
    check(lambda x: x + 1 if x.sum().item() > 0 else x - 1, lambda: (torch.randn(4),), planned=False)


def test_random_numbers_are_not_planned():
    plans, calls = counted(lambda x: F.dropout(x, 0.5))
    for _ in range(4):
        plans(torch.ones(50))
    assert len(calls) > 4


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_kernels_that_are_launched_unseen_are_not_planned(name, monkeypatch):
    monkeypatch.setattr(registry, "_implementations", {})
    register_implementation(Implementation("op", name, (), lambda x: x + 1))
    check(lambda x: select("op", "cpu", x).forward(x), lambda: (torch.randn(4),), planned=False)


def test_a_kernel_that_fails_is_left_to_the_function():
    plans, calls = counted(lambda x: x + 1)
    x = torch.randn(3)
    for _ in range(3):
        plans(x)

    def failing(_x):
        raise KernelError("out of order")

    (key,) = plans._plans
    plans._plans[key] = failing
    assert torch.equal(plans(x), x + 1)
    assert len(calls) == 3


def test_an_error_is_an_error_each_time():
    def function(x):
        raise ValueError("x: expected something else")

    plans, _ = counted(function)
    for _ in range(4):
        with pytest.raises(ValueError, match="expected something else"):
            plans(torch.randn(3))


def test_operators_inside_are_looked_into():
    def inner(x):
        return (x.sin(), x.new_empty(0))

    overload = torch.ops.aten.aminmax.default  # stands for an operator of this package
    plans, calls = counted(lambda x: torch.aminmax(x)[0] + 1, {overload: inner})
    x = torch.randn(3)
    plans(x)
    assert torch.equal(plans(x), x.sin() + 1)
    assert torch.equal(plans(-x), (-x).sin() + 1)
    assert len(calls) == 2


def test_plans_are_turned_off_by_a_variable():
    script = "import visionmamba.ops._operator as operators; print(*operators.planned_operators())"
    for value, expected in (("0", False), ("1", True)):
        environment = {**os.environ, "VISIONMAMBA_PLANS": value}
        run = subprocess.run(
            [sys.executable, "-c", f"import visionmamba; {script}"], env=environment, capture_output=True
        )
        assert run.returncode == 0, run.stderr
        assert (b"selective_scan_backward" in run.stdout) is expected


def test_forgotten_plans_are_made_anew():
    plans, calls = counted(lambda x: x + 1)
    for _ in range(3):
        plans(torch.randn(3))
    plans_module.forget_plans()
    plans(torch.randn(3))
    assert len(calls) == 3


def test_there_are_not_too_many(monkeypatch):
    monkeypatch.setattr(plans_module, "_MOST_PLANS", 4)
    plans, _ = counted(lambda x: x + 1)
    for size in range(20):
        plans(torch.randn(size))
    assert len(plans._plans) <= 4
