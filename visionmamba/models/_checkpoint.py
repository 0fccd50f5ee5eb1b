"""Reading checkpoints as their authors ship them: tensors only, any of the usual nestings and prefixes."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch.serialization import safe_globals

__all__ = ["CheckpointError", "load_checkpoint_file", "read_tensors", "strip_prefixes"]

_NESTINGS = ("model", "state_dict", "model_ema", "state_dict_ema", "module")
_WRAPPERS = ("module.", "_orig_mod.")
_BACKBONE = "backbone."
_DOWNSTREAM = ("neck.", "decode_head.", "auxiliary_head.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
_HF_SAFETENSORS = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit its model."""


class _Inert(dict):
    """Stands for a class of the authors' training code; holds its data and runs none of its code."""

    def __setstate__(self, state: object) -> None:
        self.state = state


def _inert(name: str) -> tuple[type, str]:
    return type(name.rsplit(".", 1)[-1], (_Inert,), {}), name


_ALLOWED = [
    _inert("argparse.Namespace"),  # Vim's files carry the command line under "args"
    _inert("yacs.config.CfgNode"),  # VMamba's carry their configuration
    _inert("mmengine.logging.history_buffer.HistoryBuffer"),
    _inert("mmengine.config.config.ConfigDict"),
    _inert("addict.addict.Dict"),
]


def _unpickle(path: Path, mmap: bool = False) -> object:
    try:
        with safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and nothing in a checkpoint is ever executed ({_first_line(error)}). "
            "If you trust it, save its state dict alone and load that."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint, perhaps truncated ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, KeyError):  # a byte that is no instruction of a pickle
        return "not a file of torch.save"
    lines = str(error).strip().splitlines()
    unsupported = [line.strip() for line in lines if "Unsupported" in line]
    return (unsupported or lines or [type(error).__name__])[0][:200]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error


def _tensors(checkpoint: object, path: Path) -> dict[str, torch.Tensor]:
    """Find the state dict inside a checkpoint's usual nestings."""
    for _ in range(3):
        if not isinstance(checkpoint, dict):
            break
        nested = [name for name in _NESTINGS if isinstance(checkpoint.get(name), dict)]
        if not nested:
            break
        checkpoint = checkpoint[nested[0]]
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(checkpoint).__name__}")
    tensors = {str(key): value for key, value in checkpoint.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors under {', '.join(_NESTINGS)} or at the top")
    return tensors


def read_tensors(path: Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the tensors of a file under the keys that they have there; see :func:`load_checkpoint_file`.

    Args:
        path: The file.
        mmap: Leave a ``torch.save`` file on disk until its tensors are used.
    """
    if path.suffix == _HF_SAFETENSORS:
        return _read_safetensors(path)
    return _tensors(_unpickle(path, mmap), path)


def strip_prefixes(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove wrappers' prefixes from a state dict's keys.

    Args:
        state_dict: Keys may all start with ``module.`` or ``_orig_mod.``, any number of times; some may start with
            ``backbone.``, beside a head's (OpenMMLab's layout). A detector's or segmentor's other parts are dropped.

    Returns:
        The state dict of the model itself.
    """
    changed = True
    while changed and state_dict:
        changed = False
        for prefix in _WRAPPERS:
            if all(key.startswith(prefix) for key in state_dict):
                state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
                changed = True
    if any(key.startswith(_BACKBONE) for key in state_dict):
        state_dict = {
            key.removeprefix(_BACKBONE): value for key, value in state_dict.items() if not key.startswith(_DOWNSTREAM)
        }
    return state_dict


def load_checkpoint_file(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint.

    Args:
        path: A ``.safetensors`` file, or anything ``torch.save`` wrote: a state dict, bare or nested under ``model``,
            ``state_dict`` or ``model_ema`` (the plain weights are preferred to the averaged ones, as the authors'
            evaluations do). Or a folder in the Hugging Face Hub's layout, with ``model.safetensors``, as timm's
            ``local-dir:FOLDER`` names it.

    Returns:
        The state dict, without wrappers' prefixes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, holds no tensors, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    return strip_prefixes(read_tensors(path))
