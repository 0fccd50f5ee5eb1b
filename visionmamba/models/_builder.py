"""Building a model as timm does, with this project's way of finding, reading and fitting weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg

from ._checkpoint import CheckpointError, load_checkpoint_file

__all__ = [
    "WeightsUnavailableError",
    "abbreviated",
    "build_model",
    "family_modules",
    "find_differences",
    "fitting_models",
    "published_weights",
]

_logger = logging.getLogger(__name__)
_MAX_NAMED_KEYS = 5
_CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".pth.tar", ".bin")

Tensors = dict[str, torch.Tensor]


class WeightsUnavailableError(RuntimeError):
    """Pretrained weights were asked for and could not be had."""


def family_modules() -> list[str]:
    """Return the names of the modules whose models this package registers with timm."""
    from . import FAMILIES

    return list(FAMILIES)


def _only_checkpoint(hf_hub_id: str) -> str:
    """Return the one checkpoint in a repository whose authors do not say its name."""
    from huggingface_hub import model_info

    names = [sibling.rfilename for sibling in model_info(hf_hub_id, timeout=10).siblings or ()]
    files = [name for name in names if name.endswith(_CHECKPOINT_SUFFIXES)]
    if len(files) != 1:
        raise FileNotFoundError(f"{hf_hub_id}: expected one checkpoint, found {files}")
    return files[0]


def _fetch(cfg: PretrainedCfg, variant: str) -> str:
    """Return a local copy of a model's published weights, downloading it if need be."""
    try:
        if cfg.hf_hub_id:
            from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

            file = (cfg.hf_hub_id, cfg.hf_hub_filename or _only_checkpoint(cfg.hf_hub_id))
            if not isinstance(try_to_load_from_cache(*file), str):
                get_hf_file_metadata(hf_hub_url(*file))  # fails at once offline, where the download retries for long
            return hf_hub_download(*file)
        from timm.models._hub import download_cached_file

        return download_cached_file(cfg.url, check_hash=False, progress=True)
    except Exception as error:
        page = f"https://huggingface.co/{cfg.hf_hub_id}"
        where = f"{cfg.hf_hub_filename or 'the checkpoint'} of {page}" if cfg.hf_hub_id else cfg.url
        raise WeightsUnavailableError(
            f"{variant}: the weights could not be downloaded ({type(error).__name__}). Fetch {where} on a machine that "
            "is online and pass it: create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=PATH)), or "
            "--checkpoint PATH on the command line."
        ) from error


def published_weights(cfg: PretrainedCfg, variant: str) -> Tensors:
    """Return the checkpoint that a pretrained cfg points at."""
    if cfg.state_dict is not None:
        return dict(cfg.state_dict)
    if cfg.file:
        return load_checkpoint_file(cfg.file)
    if not (cfg.url or cfg.hf_hub_id):
        raise WeightsUnavailableError(
            f"{variant}: its authors published no weights. Pass your own: create_model(name, pretrained=True, "
            "pretrained_cfg_overlay=dict(file=PATH)), or --checkpoint PATH on the command line."
        )
    return load_checkpoint_file(_fetch(cfg, variant))


def find_differences(state_dict: Tensors, model: nn.Module, ignored: tuple[str, ...]) -> dict[str, list[str]]:
    """Return what keeps a state dict from fitting a model, by kind."""
    expected = model.state_dict()
    kept = {key: value for key, value in state_dict.items() if not key.startswith(ignored)}
    return {
        "missing": [key for key in expected if key not in state_dict and not key.startswith(ignored)],
        "unexpected": [key for key in kept if key not in expected],
        "of another shape": [
            f"{key} {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            for key, value in kept.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }


def abbreviated(keys: list[str]) -> str:
    """Return the first few keys, for an error."""
    return ", ".join(keys[:_MAX_NAMED_KEYS]) + (", ..." if len(keys) > _MAX_NAMED_KEYS else "")


def fitting_models(checkpoint: Tensors) -> list[str]:
    """Return the registered models that a checkpoint fits exactly."""
    fitting = []
    for name in timm.list_models(module=family_modules()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing is copied to the meta device is the point
                overlay = {"state_dict": checkpoint}
                timm.create_model(name, device="meta", pretrained=True, pretrained_cfg_overlay=overlay)
            fitting.append(name)
        except Exception as error:
            _logger.debug("%s does not fit: %s", name, error)
    return fitting


def _names(modules: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return what a pretrained cfg names, one module or several."""
    return (modules,) if isinstance(modules, str) else tuple(modules or ())


def _shape(tensors: Tensors, key: str) -> torch.Size | None:
    return tensors[key].shape if key in tensors else None


def _classes_hint(state_dict: Tensors, expected: Tensors, classifiers: list[str]) -> str:
    """Return how to read a checkpoint of another number of classes, if that is all that is wrong with it."""
    leaves = {key.removesuffix("weight") + leaf for key in classifiers for leaf in ("weight", "bias")}
    other = {key for key in expected.keys() | state_dict.keys() if _shape(state_dict, key) != _shape(expected, key)}
    if not other or not other <= leaves or not set(classifiers) <= state_dict.keys():
        return ""
    classes = state_dict[classifiers[0]].shape[0]
    return f" It has {classes} classes: give num_classes={classes}."


def _strict_filter(
    checkpoint_filter_fn: Callable[[Tensors, nn.Module], Tensors], variant: str, explain: bool
) -> Callable[[Tensors, nn.Module], Tensors]:
    """Wrap a family's filter so that a misfit is one clear error."""

    def filter_fn(checkpoint: Tensors, model: nn.Module) -> Tensors:
        state_dict = checkpoint_filter_fn(dict(checkpoint), model)
        cfg, expected = model.pretrained_cfg, model.state_dict()
        classifiers = [f"{name}.weight" for name in _names(cfg.get("classifier"))]
        if classifiers and all(_shape(state_dict, key) == _shape(expected, key) is not None for key in classifiers):
            cfg["num_classes"] = model.num_classes  # the checkpoint's own classes: timm would drop them otherwise
        ignored = _names(cfg.get("classifier")) if model.num_classes != cfg["num_classes"] else ()
        if model.in_chans != cfg["input_size"][0]:
            ignored += _names(cfg.get("first_conv"))
        differences = {kind: keys for kind, keys in find_differences(state_dict, model, ignored).items() if keys}
        if differences:
            listing = "; ".join(f"{len(keys)} {kind} ({abbreviated(keys)})" for kind, keys in differences.items())
            hint = _classes_hint(state_dict, expected, classifiers)
            fitting = fitting_models(checkpoint) if explain and not hint else []
            hint = f" It fits {', '.join(fitting)}." if fitting else hint
            raise CheckpointError(f"{variant}: the checkpoint does not fit: {listing}.{hint}")
        return state_dict

    return filter_fn


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable[[Tensors, nn.Module], Tensors],
    **kwargs: Any,
) -> nn.Module:
    """Build a model of the zoo; the families' counterpart of timm's ``build_model_with_cfg``.

    Args:
        model_cls: Model class.
        variant: Registered name.
        pretrained: Load weights: from ``pretrained_cfg_overlay=dict(file=PATH)`` (an authors' checkpoint in any of its
            layouts, or this project's own), else from where the authors publish them.
        checkpoint_filter_fn: ``(state_dict, model) -> state_dict``, from an official layout or this project's own to
            the model's. Keys of tables that the model recomputes are to be dropped there.
        **kwargs: As for timm: model arguments, ``features_only``, ``pretrained_cfg``, ...; always ``out_indices``, the
            levels that ``features_only`` returns.

    Returns:
        The model, or its feature extractor with ``features_only``.

    Raises:
        WeightsUnavailableError: Weights were asked for and could not be had.
        CheckpointError: They could not be read or do not fit; says which keys, and which models they would fit.
    """
    kwargs["feature_cfg"] = dict(out_indices=kwargs.pop("out_indices"), feature_cls="getter")
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(variant, kwargs.pop("pretrained_cfg", None), overlay)
    if isinstance(cfg, tuple):  # (cfg, additional arguments) in some versions of timm
        cfg = cfg[0]
    if tuple(cfg.input_size[-2:]) != tuple(timm.get_pretrained_cfg(variant).input_size[-2:]):
        kwargs.setdefault("img_size", tuple(cfg.input_size[-2:]))  # as timm does for models of a fixed size
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, False, pretrained_cfg=cfg, **kwargs)
    explain = cfg.state_dict is None
    model = build_model_with_cfg(
        model_cls,
        variant,
        True,
        pretrained_cfg=replace(cfg, state_dict=published_weights(cfg, variant)),
        pretrained_filter_fn=_strict_filter(checkpoint_filter_fn, variant, explain),
        **kwargs,
    )
    for owner in (model, getattr(model, "model", None)):
        if hasattr(owner, "pretrained_cfg"):
            owner.pretrained_cfg.pop("state_dict", None)  # the weights are in the model now
    return model
