"""Reading and writing language-model checkpoints: mamba_ssm's and Hugging Face's layouts, local or from the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models._checkpoint import read_tensors

__all__ = ["Source", "from_huggingface", "load", "save", "to_huggingface"]

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LAYOUTS = ("mamba_ssm", "huggingface")
_EMBEDDING, _HF_EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"
_HEAD = "lm_head.weight"


class Source:
    """Files of a model in a local folder or a repository of the Hugging Face hub.

    Args:
        name: Folder or repository.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)
        self.folder = Path(name) if Path(name).is_dir() else None
        self._unreachable = False

    def path(self, file: str) -> Path | None:
        """Return where a file is, after downloading it if need be; None if there is none.

        Raises:
            FileNotFoundError: The name is neither a folder nor a repository.
        """
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        try:
            return Path(hf_hub_download(self.name, file))
        except LocalEntryNotFoundError:  # offline, and not among the files that were downloaded before
            self._unreachable = True
            return None
        except EntryNotFoundError:
            return None
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(f"{self.name}: neither a folder nor a repository of the hub") from error

    def missing(self, what: str) -> FileNotFoundError:
        """Return the error that says what there is none of, and whether the hub could be asked."""
        if self._unreachable:
            return FileNotFoundError(
                f"{self.name}: not a folder; as a repository, {what} in the local cache, and the hub cannot be reached"
            )
        return FileNotFoundError(f"{self.name}: {what}")

    def config(self) -> dict[str, Any]:
        """Return the parsed ``config.json``.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no JSON object.
        """
        path = self.path(_CONFIG)
        if path is None:
            raise self.missing(f"no {_CONFIG}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got what cannot be parsed ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights. Only tensors are ever unpickled.

        Raises:
            FileNotFoundError: There are none.
            CheckpointError: A file cannot be read, or holds code.
        """
        for file in _WEIGHTS:
            path = self.path(file)
            if path is not None:
                return read_tensors(path, mmap=True)
            index = self.path(f"{file}.index.json")
            if index is not None:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                return {key: tensor for shard in shards for key, tensor in self._shard(shard).items()}
        raise self.missing(f"neither {' nor '.join(_WEIGHTS)} (or their shards)")

    def _shard(self, file: str) -> dict[str, Tensor]:
        path = self.path(file)
        if path is None:
            raise self.missing(f"no {file}, which the index names")
        return read_tensors(path, mmap=True)


def from_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a checkpoint's entries from Hugging Face's layout to mamba_ssm's; others stay as they are."""
    return {_EMBEDDING if key == _HF_EMBEDDING else key: tensor for key, tensor in state_dict.items()}


def to_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a checkpoint's entries from mamba_ssm's layout to Hugging Face's."""
    return {_HF_EMBEDDING if key == _EMBEDDING else key: tensor for key, tensor in state_dict.items()}


def _kind(keys) -> str | None:
    """Say which Mamba a checkpoint holds."""
    leaves = {key.split(".mixer.", 1)[1] for key in keys if ".mixer." in key}
    if "x_proj.weight" in leaves:
        return "Mamba1"
    return "Mamba2" if "dt_bias" in leaves else None


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of either layout into a model, strictly.

    Args:
        model: A :class:`visionmamba.language.MambaLMHeadModel`.
        state_dict: Its weights.

    Raises:
        ValueError: The checkpoint is of the other Mamba, lacks entries, or has others or other shapes.
    """
    state_dict = from_huggingface(state_dict)
    if _EMBEDDING in state_dict and model.config.tie_embeddings:
        state_dict.setdefault(_HEAD, state_dict[_EMBEDDING])
    held, wanted = _kind(state_dict), model.config.layer
    if held is not None and held != wanted:
        raise ValueError(f"checkpoint: expected a {wanted} model, as the config says, got the weights of {held}")
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in expected]
    problems += [
        f"{key} has shape {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"checkpoint: does not fit the config: {shown}")
    model.load_state_dict(state_dict)


def save(model: nn.Module, folder: Path, safe_serialization: bool, layout: str) -> None:
    """Write a model's configuration and weights; see ``MambaLMHeadModel.save_pretrained``."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}")
    huggingface = layout == "huggingface"
    config = model.config.to_huggingface() if huggingface else model.config.to_dict()
    state_dict = model.state_dict()
    if huggingface:
        state_dict = to_huggingface(state_dict)
    if model.config.tie_embeddings and (huggingface or safe_serialization):
        state_dict.pop(_HEAD)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if safe_serialization:
        contiguous = {key: tensor.contiguous() for key, tensor in state_dict.items()}
        save_file(contiguous, folder / _WEIGHTS[0], metadata={"format": "pt"})
    else:
        torch.save(state_dict, folder / _WEIGHTS[1])
