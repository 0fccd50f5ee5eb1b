"""Goldens of small language models: configuration, weights made by the goldens' recipe, and official results."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visionmamba.language import MambaConfig, MambaLMHeadModel

_DATA = Path(__file__).resolve().parents[1] / "data"

NAMES = ("mamba1_tiny", "mamba1_untied_ln", "mamba2_norms_off", "mamba2_tiny", "hybrid_mha_mlp", "hybrid_mha_dconv")


def _load_recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", _DATA / "goldens" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_recipe = _load_recipe()


def document(name: str) -> dict[str, Any]:
    """Return a json file of the goldens."""
    return json.loads((_DATA / "mamba_lm" / f"{name}.json").read_text())


@dataclass(frozen=True)
class LanguageGolden:
    """One model: its configuration, inputs and official results."""

    name: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def tokens(self, which: str) -> torch.Tensor:
        """Return ``"tokens"`` (2, 64) or ``"prompt"`` (2, 16)."""
        description = self.info[which]
        return torch.from_numpy(
            _recipe.golden_tokens(description["shape"], description["vocab_size"], description["tag"])
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the recipe's weights under the official keys."""
        weights = {key: torch.from_numpy(_recipe.golden_tensor(key, shape)) for key, shape in self.info["keys"]}
        if self.info["config"]["tie_embeddings"]:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        return weights

    def config(self) -> MambaConfig:
        """Return the configuration, read as ``config.json`` is."""
        return MambaConfig.from_dict(self.info["config"])

    def model(self) -> MambaLMHeadModel:
        """Return the model with the recipe's weights."""
        model = MambaLMHeadModel(self.config())
        model.load_state_dict(self.state_dict())
        return model.eval()


@cache
def language_golden(name: str) -> LanguageGolden:
    """Return a golden by name."""
    with np.load(_DATA / "mamba_lm" / f"{name}.npz") as arrays:
        return LanguageGolden(name, document(name), dict(arrays))


def small_model(kind: str, seed: int = 0, **changes) -> MambaLMHeadModel:
    """Return a model of a golden's configuration with random weights: ``"mamba1"``, ``"mamba2"`` or ``"hybrid"``."""
    name = {"mamba1": "mamba1_tiny", "mamba2": "mamba2_tiny", "hybrid": "hybrid_mha_dconv", "mlp": "hybrid_mha_mlp"}[
        kind
    ]
    torch.manual_seed(seed)
    return MambaLMHeadModel(MambaConfig(**(document(name)["config"] | changes))).eval()
