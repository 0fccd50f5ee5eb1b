"""Loading backbones from checkpoints of classifiers, detectors and segmentors, the authors' or OpenMMLab's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from timm.models import get_pretrained_cfg

from ..models._builder import abbreviated, find_differences, fitting_models, published_weights
from ..models._checkpoint import CheckpointError, load_checkpoint_file

if TYPE_CHECKING:
    from .backbone import VisionMambaBackbone

__all__ = ["PUBLISHED", "fit_weights", "read_weights"]

PUBLISHED = "published"
"""In place of a path: the weights that the model's authors published."""

Tensors = dict[str, torch.Tensor]

_OUT_NORM = re.compile(r"(?:outnorm|norm_layer)_?(\d+)\.(weight|bias)")
_OF_CLASSIFIERS = ("head.", "norm.", "fc_norm.")
"""What detectors' and segmentors' checkpoints lack, and backbones have no use for."""


def read_weights(checkpoint: str, model_name: str) -> Tensors:
    """Read a checkpoint's tensors, without prefixes and without the other parts of a detector or segmentor.

    Args:
        checkpoint: Path, URL or :data:`PUBLISHED`.
        model_name: Name in timm's registry of the model that the weights are for.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read.
        WeightsUnavailableError: There are no published weights, or they cannot be downloaded.
    """
    if checkpoint == PUBLISHED:
        return published_weights(get_pretrained_cfg(model_name), model_name)
    if checkpoint.startswith(("http://", "https://")):
        from timm.models._hub import download_cached_file

        checkpoint = download_cached_file(checkpoint, check_hash=False, progress=True)
    return load_checkpoint_file(checkpoint)


def _check(
    weights: Tensors, module: torch.nn.Module, ignored: tuple[str, ...], name: str, whole: Tensors | None = None
) -> None:
    """Raise if weights do not fit; say which models the whole checkpoint would fit, if it is given."""
    differences = {kind: keys for kind, keys in find_differences(weights, module, ignored).items() if keys}
    if differences:
        listing = "; ".join(f"{len(keys)} {kind} ({abbreviated(keys)})" for kind, keys in differences.items())
        fitting = fitting_models(whole) if whole else []
        hint = f" It fits {', '.join(fitting)}." if fitting else ""
        raise CheckpointError(f"{name}: the checkpoint does not fit: {listing}.{hint}")


def _fit_out_norms(norms: dict[int, Tensors], final: dict[int, Tensors], backbone: VisionMambaBackbone) -> Tensors:
    """Return our names of output norms, given by the index of the stage or block that they follow.

    Args:
        norms: Those of a detector's or segmentor's checkpoint.
        final: The classifier's final norm, where it is an output's too.
        backbone: The backbone they are for.
    """
    if norms and backbone.out_norms is None:
        raise CheckpointError(f"{backbone.model_name}: the checkpoint has output norms, but out_norm is False")
    given = norms | final
    missing = [index for index in backbone.out_indices if index not in given]
    if norms and missing:
        raise CheckpointError(
            f"{backbone.model_name}: the checkpoint has output norms for {sorted(given)}, not for {missing}"
        )
    return {
        f"out_norms.norms.{position}.{leaf}": value
        for position, index in enumerate(backbone.out_indices)
        for leaf, value in given.get(index, {}).items()
    }


def _without_class_token(weights: Tensors, model: torch.nn.Module) -> Tensors:
    """Drop a class token that a plain model does without, and its row of the position embedding.

    The authors of Vim drop row 0 instead, which belongs to the first patch: their class token stands in the middle.
    """
    if "cls_token" not in weights or getattr(model, "cls_token", None) is not None:
        return weights
    embed = weights["pos_embed"]
    middle = (embed.shape[1] - 1) // 2
    kept = {key: value for key, value in weights.items() if key != "cls_token"}
    return {**kept, "pos_embed": torch.cat([embed[:, :middle], embed[:, middle + 1 :]], dim=1)}


def fit_weights(state_dict: Tensors, backbone: VisionMambaBackbone) -> Tensors:
    """Convert a checkpoint to a backbone's state dict; only the classifier, its norm and output norms may be missing.

    Args:
        state_dict: A classifier's, in any layout of its authors or of this project; a detector's or segmentor's
            backbone, with the authors' names or as :class:`VisionMambaBackbone` saves itself.
        backbone: The backbone it is for.

    Returns:
        The weights under the backbone's own names. Without output norms if the checkpoint has none.

    Raises:
        CheckpointError: Anything else is missing, unexpected or of another shape.
    """
    if any(key.startswith("model.") for key in state_dict):  # saved by this class
        _check(state_dict, backbone, (), backbone.model_name, state_dict)
        return state_dict
    norms: dict[int, Tensors] = {}
    weights, adapter = {}, {}
    for key, value in state_dict.items():
        if key.startswith(backbone.adapter_parts):
            adapter[key] = value
            continue
        match = _OUT_NORM.fullmatch(key)
        if match:
            norms.setdefault(int(match[1]), {})[match[2]] = value
        else:
            weights[key] = value
    whole = backbone.create_model(device="meta")
    converted = backbone.checkpoint_filter_fn(_without_class_token(weights, whole), whole)
    _check(converted, whole, _OF_CLASSIFIERS, backbone.model_name, state_dict)
    final = {}
    if backbone.final_norm_is_output and "norm.weight" in converted:
        final[backbone.out_indices[-1]] = {leaf: converted[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    kept = backbone.model.state_dict()
    ours = {f"model.{key}": value for key, value in converted.items() if key in kept}
    if adapter:
        _check(adapter, backbone, ("model.",), backbone.model_name)
    return ours | adapter | _fit_out_norms(norms, final, backbone)
