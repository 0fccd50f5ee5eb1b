"""Backend selection: order of preference, forcing, refusals, explanations."""

import sys

import pytest
import torch

from visionmamba.ops import BACKENDS, backend, causal_conv1d, explain, selective_scan
from visionmamba.ops.selective_scan import pytorch

registry = sys.modules["visionmamba.ops.backend"]  # visionmamba.ops.backend itself is the context manager


@pytest.fixture
def operator(monkeypatch):
    """An operator of its own, empty at first, with no backend asked for."""
    monkeypatch.setattr(registry, "_implementations", {"op": {}})
    monkeypatch.delenv("VISIONMAMBA_BACKEND", raising=False)
    registry._probe.cache_clear()
    yield "op"
    registry._probe.cache_clear()


def add(name, device_types=(), **functions):
    implementation = registry.Implementation("op", name, device_types, forward=lambda: name, **functions)
    registry.register_implementation(implementation)
    return implementation


class TestSelection:
    def test_first_in_order_of_preference(self, operator):
        for name in reversed(BACKENDS):
            add(name)
            assert registry.select(operator, "cpu").backend == name

    def test_device_decides(self, operator):
        add("cuda", ("cuda",)), add("cpu", ("cpu",)), add("torch")
        assert [registry.select(operator, device).backend for device in ("cuda", "cpu", "mps")] == [
            "cuda",
            "cpu",
            "torch",
        ]

    def test_machine_decides_once(self, operator):
        asked = []
        add("cpu", probe=lambda: asked.append(1) or "no threads here"), add("torch")
        assert {registry.select(operator, "cpu").backend for _ in range(3)} == {"torch"}
        assert len(asked) == 1

    def test_arguments_decide(self, operator):
        add("cpu", supports=lambda width: "width above 4" if width > 4 else None), add("torch")
        assert registry.select(operator, "cpu", 4).backend == "cpu"
        assert registry.select(operator, "cpu", 5).backend == "torch"

    def test_later_registration_replaces(self, operator):
        add("cpu", probe=lambda: "broken"), add("torch")
        assert registry.select(operator, "cpu").backend == "torch"
        add("cpu")
        assert registry.select(operator, "cpu").backend == "cpu"

    def test_nothing_runs(self, operator):
        add("cuda", ("cuda",))
        with pytest.raises(RuntimeError, match=r"op: no backend can run on cpu: .*'cuda': 'runs on cuda, not on cpu'"):
            registry.select(operator, "cpu")

    def test_unknown_backend_is_not_registered(self, operator):
        with pytest.raises(ValueError, match=r"backend: expected one of cuda, triton, cpu, torch, got 'jax'"):
            add("jax")


class TestForcing:
    def test_context_manager(self, operator):
        add("cpu"), add("torch")
        with backend("torch"):
            assert registry.select(operator, "cpu").backend == "torch"
            with backend("cpu"):
                assert registry.select(operator, "cpu").backend == "cpu"
            assert registry.select(operator, "cpu").backend == "torch"
        assert registry.select(operator, "cpu").backend == "cpu"

    def test_ends_with_an_exception(self):
        before = registry.requested_backend()
        with pytest.raises(KeyError), backend("torch"):
            raise KeyError
        assert registry.requested_backend() == before

    def test_environment_variable(self, operator, monkeypatch):
        add("cpu"), add("torch")
        monkeypatch.setenv("VISIONMAMBA_BACKEND", "torch")
        assert registry.select(operator, "cpu").backend == "torch"
        with backend("cpu"):
            assert registry.select(operator, "cpu").backend == "cpu"
        monkeypatch.setenv("VISIONMAMBA_BACKEND", "")
        assert registry.select(operator, "cpu").backend == "cpu"

    @pytest.mark.parametrize("name", ["jax", "", "CUDA"])
    def test_unknown_name(self, name):
        with pytest.raises(ValueError, match=r"backend: expected one of cuda, triton, cpu, torch, got"), backend(name):
            pass

    def test_unknown_name_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("VISIONMAMBA_BACKEND", "jax")
        with pytest.raises(ValueError, match=r"VISIONMAMBA_BACKEND: expected one of cuda, .*, got 'jax'"):
            selective_scan(*scan_arguments())

    def test_refusal_says_why(self, operator):
        add("cuda", ("cuda",)), add("cpu", supports=lambda width: f"width {width} is above 4"), add("torch")
        with (
            backend("cuda"),
            pytest.raises(RuntimeError, match=r"'cuda' was asked for but .*: runs on cuda, not on cpu"),
        ):
            registry.select(operator, "cpu")
        with backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for but .*: width 5 is above 4"):
            registry.select(operator, "cpu", 5)
        with (
            backend("triton"),
            pytest.raises(RuntimeError, match=r"op: backend 'triton' was asked for; it has cuda, cpu"),
        ):
            registry.select(operator, "cpu")


class TestExplain:
    def test_names_reasons_in_order(self, operator):
        add("torch"), add("cpu", ("cpu",), probe=lambda: "numba is not installed"), add("cuda", ("cuda",))
        assert list(explain(operator, "cpu").items()) == [
            ("cuda", "runs on cuda, not on cpu"),
            ("cpu", "numba is not installed"),
            ("torch", None),
        ]

    def test_unknown_operator(self, operator):
        with pytest.raises(ValueError, match=r"op: expected one of op, got 'flash'"):
            explain("flash", "cpu")

    @pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
    @pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
    def test_plain_pytorch_runs_anywhere(self, name, device):
        assert name in registry.operators()
        reasons = explain(name, device)
        assert reasons["torch"] is None
        assert all(reason is None or (reason and reason == reason.strip()) for reason in reasons.values())


def scan_arguments():
    return (
        torch.randn(1, 4, 3), torch.randn(1, 4, 1, 3), -torch.rand(1, 3, 2), torch.randn(1, 4, 1, 2),
        torch.randn(1, 4, 1, 2),
    )  # fmt: skip


class TestOperators:
    def test_forced_backend_runs_forward_and_backward(self, monkeypatch):
        calls = []
        spied = registry.Implementation(
            "selective_scan", "torch", (),
            lambda *args: calls.append("forward") or pytorch.forward(*args),
            lambda *args: calls.append("backward") or pytorch.backward(*args),
        )  # fmt: skip
        monkeypatch.setitem(registry._implementations["selective_scan"], "torch", spied)
        arguments = scan_arguments()
        arguments[0].requires_grad_()
        with backend("torch"):
            selective_scan(*arguments)[0].sum().backward()
        assert calls == ["forward", "backward"]

    def test_refusal_reaches_the_caller(self):
        with backend("cuda"), pytest.raises(RuntimeError, match=r"selective_scan: backend 'cuda' was asked for"):
            selective_scan(*scan_arguments())
        with backend("triton"), pytest.raises(RuntimeError, match=r"causal_conv1d: backend 'triton' was asked for"):
            causal_conv1d(torch.randn(1, 4, 3), torch.randn(1, 3, 4))
