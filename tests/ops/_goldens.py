"""Goldens of single operators: inputs made by the goldens' recipe, and what the official code computes from them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

_DATA = Path(__file__).resolve().parents[1] / "data"


def _load_recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", _DATA / "goldens" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_recipe = _load_recipe()


def _tensor(description: Mapping[str, Any]) -> torch.Tensor:
    if "int_values" in description:
        return torch.tensor(description["int_values"], dtype=torch.int32)
    if description.get("complex"):
        return torch.complex(_tensor(description["re"]), _tensor(description["im"]))
    x = _recipe.golden_input(tuple(description["shape"]), description["tag"])
    return torch.from_numpy(np.asarray(eval(description["expr"], {"x": x, "np": np}), dtype=np.float32))


def _widen(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()


@dataclass(frozen=True)
class OperatorGolden:
    """One case: its parameters, inputs, cotangents, and the official float32 results with their distance to float64."""

    name: str
    params: dict[str, Any]
    _inputs: dict[str, Any]
    _cotangents: dict[str, Any]
    expected: dict[str, np.ndarray]
    f32_err: dict[str, float]
    f64_absmax: dict[str, float]

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Return fresh inputs; floating ones are leaves that require gradients if the case has any."""
        tensors = {name: _widen(_tensor(description), dtype).to(device) for name, description in self._inputs.items()}
        for tensor in tensors.values():
            tensor.requires_grad_(bool(self._cotangents) and tensor.dtype != torch.int32)
        return tensors

    def backward(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Backpropagate the golden's loss."""
        names = list(self._cotangents)
        cotangents = [_tensor(self._cotangents[name]).to(outputs[name]) for name in names]
        torch.autograd.backward([outputs[name] for name in names], cotangents)

    def check(self, outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        """Compare every expected output, and the inputs' gradients, with the official results."""
        results = dict(outputs) | {f"grad_{name}": x.grad for name, x in inputs.items() if x.grad is not None}
        assert set(self.expected) <= set(results), set(self.expected) - set(results)
        for name, expected in self.expected.items():
            result = results[name].detach().cpu()
            assert result.shape == expected.shape, f"{name}: {result.shape} instead of {expected.shape}"
            error = np.abs(result.numpy().astype(np.complex128) - expected).max()
            tolerance = self.tolerance(name, result.dtype)
            assert error <= tolerance, f"{name}: off by {error}, at most {tolerance} expected"

    def tolerance(self, name: str, dtype: torch.dtype) -> float:
        """Return how far a result may be from the official float32 one.

        A float64 result may be as far from it as the official float64 result is. A float32 result adds its own
        rounding: three times that of the official code, and four units in the last place of the largest value.
        """
        if dtype in (torch.float64, torch.complex128):
            return self.f32_err[name] * 1.0001 + 1e-12 * self.f64_absmax[name]
        return 4 * self.f32_err[name] + 4 * torch.finfo(torch.float32).eps * self.f64_absmax[name]


@cache
def operator_goldens(operator: str) -> dict[str, OperatorGolden]:
    """Return an operator's cases by name, e.g. of ``"selective_scan"``."""
    document = json.loads((_DATA / "ops" / f"{operator}_cases.json").read_text())
    with np.load(_DATA / "ops" / f"{operator}_cases.npz") as arrays:
        return {
            case["name"]: OperatorGolden(
                name=case["name"],
                params=case["params"],
                _inputs=case["inputs"],
                _cotangents=case.get("upstream_grads", {}),
                expected={output: arrays[f"{case['name']}.{output}"] for output in case["outputs"]},
                f32_err=case["f32_err"],
                f64_absmax=case["f64_absmax"],
            )
            for case in document["cases"]
        }
