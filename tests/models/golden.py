"""Goldens: what the official implementations compute, and the checks that ours computes it too.

A golden holds the official state dict's keys and shapes, and outputs of the official code under weights that are a pure
function of key and shape (``recipe.py``). :func:`golden` loads one; it writes those weights to a checkpoint file nested
as the authors nest theirs, builds our model from that file, and compares logits, features and gradient norms within
``index.json``'s tolerances::

    case = golden("vmamba/vmamba_tiny_s1l8")
    model = case.create_model(tmp_path)
    logits = model(case.input)
    case.check_logits(logits)
    case.check_gradients(model, official_state_dict)      # after the golden's loss was backpropagated

The goldens that default tests use are copied to ``tests/data/goldens``; the others are looked for in
``../shared/goldens`` and their tests skipped without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

import visionmamba  # noqa: F401  registers the models

__all__ = ["Golden", "cases", "golden", "golden_names", "recipe"]

_TESTS = Path(__file__).resolve().parents[1]
_COPIES = _TESTS / "data" / "goldens"
_SHARED = _TESTS.parents[1] / "shared" / "goldens"
_INDEX = json.loads((_COPIES / "index.json").read_text())
_UNBIASED = ("vim", "mamba_nd")
"""Families whose feature statistics hold the unbiased standard deviation; the others' hold the population's."""

Tensors = dict[str, torch.Tensor]


def _load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", _COPIES / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _load_recipe()


def golden_names(family: str, *kinds: str) -> list[str]:
    """Return the goldens of a family (of certain kinds), e.g. ``["vmamba/ab_bidi", ...]``."""
    return [
        name
        for name, entry in _INDEX.items()
        if name.startswith(f"{family}/") and (not kinds or entry["kind"] in kinds)
    ]


def cases(family: str, *kinds: str, fast: tuple[str, ...] = ()) -> list:
    """Return a family's goldens as pytest parameters, marked ``slow`` but for those named in ``fast``."""
    return [
        pytest.param(name, marks=() if name.split("/")[1] in fast else pytest.mark.slow, id=name.split("/")[1])
        for name in golden_names(family, *kinds)
    ]


def golden(name: str) -> Golden:
    """Load a golden; skips the running test if this clone does not have it.

    Args:
        name: ``family/variant``, as in ``index.json``.
    """
    for folder in (_COPIES, _SHARED):
        if (folder / f"{name}.json").is_file():
            with np.load(folder / f"{name}.npz") as arrays:
                return Golden(name, json.loads((folder / f"{name}.json").read_text()), dict(arrays), _INDEX[name])
    pytest.skip(f"golden {name}: neither in tests/data/goldens nor in ../shared/goldens")


@dataclass
class Golden:
    """One golden.

    Args:
        name: ``family/variant``.
        info: Its json.
        arrays: Its npz.
        entry: Its entry in ``index.json``: kind, model, kwargs, tolerances.
    """

    name: str
    info: dict
    arrays: dict[str, np.ndarray]
    entry: dict

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def atol(self) -> float:
        return self.entry["logits_atol"]

    @cached_property
    def input(self) -> torch.Tensor:
        """The network's input."""
        return torch.from_numpy(recipe.golden_input(tuple(self.info["input_shape"])))

    def _is_table(self, key: str) -> bool:
        return key in self.info.get("keys_not_from_recipe", ()) or key.startswith("rope.")

    def official_weights(self, keys: list | None = None, tables: bool = False) -> Tensors:
        """Return the official state dict, with the recipe's values.

        Args:
            keys: ``[name, shape]`` pairs; those of the json if absent.
            tables: Also the tables that a model recomputes (rope), with meaningless values: loading must ignore them.
        """
        return {
            key: torch.from_numpy(np.asarray(recipe.golden_tensor(key, tuple(shape))))
            for key, shape in keys or self.info["keys"]
            if tables or not self._is_table(key)
        }

    def checkpoint(self, folder: Path, weights: Tensors | None = None) -> Path:
        """Write a checkpoint as the authors nest theirs.

        Args:
            folder: Where to.
            weights: Official state dict; :meth:`official_weights` if absent.

        Returns:
            The file.
        """
        weights = self.official_weights() if weights is None else weights
        if self.family == "efficient_vmamba":
            content = {"state_dict": {f"module.module.{key}": value for key, value in weights.items()}}
        elif self.family in ("plainmamba", "mamba_nd", "localmamba"):
            content = {"state_dict": weights, "meta": {"epoch": 300}}
        else:
            content = {"model": weights, "optimizer": {}, "epoch": 299, "args": argparse.Namespace(lr=5e-4)}
        path = Path(folder) / "official.pth"
        torch.save(content, path)
        return path

    def create_model(
        self, folder: Path, model: str | None = None, weights: Tensors | None = None, **kwargs
    ) -> nn.Module:
        """Build our model from the official checkpoint, in evaluation mode.

        Args:
            folder: A temporary folder for the checkpoint file.
            model: Registered name; the one in ``index.json`` if absent.
            weights: Official state dict; :meth:`official_weights` if absent.
            **kwargs: Constructor arguments beside those of ``index.json``.
        """
        overlay = {"file": str(self.checkpoint(folder, weights))}
        kwargs = {**self.entry.get("kwargs", {}), **kwargs}
        model = model or self.entry["model"]
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    def check_logits(self, logits: torch.Tensor, key: str = "logits") -> None:
        """Assert that logits are the golden's."""
        expected = torch.from_numpy(self.arrays[key])
        torch.testing.assert_close(logits.detach(), expected, atol=self.atol, rtol=0, msg=lambda text: f"{key}: {text}")

    def check_feature(self, key: str, feature: torch.Tensor) -> None:
        """Assert that a feature is the golden's: shape, first 16 values, mean, standard deviation, L2 norm.

        Args:
            key: ``feat0``, ``out1``, ``stem``, ...: the arrays' prefix.
            feature: In the layout the json names (channels first or last).
        """
        flat = feature.detach().contiguous().flatten().double()
        shape = tuple(self.arrays[f"{key}_shape"].tolist())
        assert tuple(feature.shape) == shape, f"{key}: shape {tuple(feature.shape)}, expected {shape}"
        unbiased = self.family in _UNBIASED
        stats = torch.stack([flat.mean(), flat.std(unbiased=unbiased), flat.norm()])
        for part, value in (("first16", flat[:16]), ("stats", stats)):
            expected = torch.from_numpy(self.arrays[f"{key}_{part}"]).double()
            # an L2 norm grows with the number of elements: its tolerance is relative
            scale = torch.tensor([1, 1, max(1.0, expected[-1].item())]) if part == "stats" else 1
            error = ((value - expected).abs() / scale).max().item()
            assert error <= self.atol, f"{key}_{part}: off by {error:.2e}, tolerance {self.atol}"

    @property
    def gradient_keys(self) -> list[str]:
        """Official names of the parameters behind ``grad_norms``, in order."""
        names = ("grad_param_names", "grad_norm_keys", "grad_norm_params")
        return next(self.info[name] for name in names if name in self.info)

    def gradient_norms(
        self,
        model: nn.Module,
        official_state_dict: Callable[[Mapping[str, torch.Tensor], nn.Module], Mapping[str, torch.Tensor]],
    ) -> np.ndarray:
        """Return the norms of a model's gradients, in the order of ``gradient_keys``; NaN stands for no gradient.

        Args:
            model: Ours, after ``backward`` of the golden's loss (``logits.float().pow(2).mean()``).
            official_state_dict: The family's; it is applied to the gradients.
        """
        gradients = {
            name: torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        official = official_state_dict(gradients, model)
        missing = [key for key in self.gradient_keys if key not in official]
        assert not missing, f"official_state_dict does not return {missing[:5]}"
        return np.array([official[key].double().norm().item() for key in self.gradient_keys])

    def check_gradients(
        self,
        model: nn.Module,
        official_state_dict: Callable[[Mapping[str, torch.Tensor], nn.Module], Mapping[str, torch.Tensor]],
    ) -> None:
        """Assert that gradient norms are the golden's, by official parameter; see :meth:`gradient_norms`."""
        norms = self.gradient_norms(model, official_state_dict)
        wrong = []
        for key, norm, expected in zip(self.gradient_keys, norms, self.arrays["grad_norms"], strict=True):
            if np.isnan(expected) or expected == 0:  # the loss does not depend on it
                agrees = np.isnan(norm) or norm == 0
            else:
                agrees = abs(norm - expected) <= self.entry["grad_rtol"] * abs(expected)
            if not agrees:
                wrong.append(f"{key}: {norm:.6g}, expected {expected:.6g}")
        assert not wrong, f"{len(wrong)} of {len(self.gradient_keys)} gradient norms differ: " + "; ".join(wrong[:8])
