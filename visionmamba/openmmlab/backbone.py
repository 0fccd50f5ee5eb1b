"""Every model of the zoo as a backbone of mmdetection and mmsegmentation."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import model_entrypoint
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import OutputNorms
from ..models._builder import family_modules
from .weights import fit_weights, read_weights

__all__ = ["VisionMambaBackbone"]

_OUT_NORM_EPS = {"vmamba": 1e-5, "efficient_vmamba": 1e-5, "local_vmamba": 1e-5, "local_vim": 1e-5, "plainmamba": 1e-6}
"""Families whose authors normalise each output, and the epsilon of those norms."""

_ANY_SIZE = {"vim": dict(dynamic_img_size=True, dynamic_img_pad=True)}
"""What a family must be told to take images of any size."""

_PLAIN_OUTPUTS = 4
_NEAR_NAMES = 5


def _check_name(model_name: str) -> str:
    """Return the name of the family of a model of images."""
    names = [
        name
        for name in timm.list_models(module=[name for name in family_modules() if name != "mamba_nd_btcv"])
        if "mamba3d" not in name
    ]
    base = model_name.split(".")[0]
    if base not in names:
        near = difflib.get_close_matches(base, names, n=_NEAR_NAMES, cutoff=0.4) or names
        raise ValueError(f"model_name: expected a model of images such as {', '.join(near)}, got {model_name!r}")
    return model_entrypoint(base).__module__.rpartition(".")[2]


def _check_init_cfg(init_cfg: dict | list | None) -> dict | None:
    if isinstance(init_cfg, list) and len(init_cfg) == 1:
        init_cfg = init_cfg[0]
    if init_cfg is not None and not (
        isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained" and init_cfg.get("checkpoint")
    ):
        raise ValueError(f"init_cfg: expected None or dict(type='Pretrained', checkpoint=...), got {init_cfg!r}")
    return init_cfg


@MODELS.register_module()
class VisionMambaBackbone(BaseModule):
    """A model of the zoo as a backbone; registered with mmengine, so that mmdet and mmseg both find it.

    The outputs are normalised as the authors' own backbones do: VMamba, EfficientVMamba, LocalVMamba and LocalVim have
    a layer norm for each output (official ``outnorm{i}``), PlainMamba too (``norm_layer{i}``; the last block's is the
    classifier's final norm); Vim and Mamba-ND return the bare residual stream. The authors' LocalVim and Vim
    segmentation backbones take the mixers' outputs: ``feature_stream="mixer"``.

    Args:
        model_name: Name in timm's registry, of a model of images.
        out_indices: Stages (VMamba and its relatives) or blocks (plain families) to return, increasing, from 0. Without
            them all stages, or the last block of each quarter.
        out_norm: A layer norm over channels for each output; the authors' choice for the family if absent.
        frozen_stages: -1: train everything; 0: freeze the patch embedding (and what is added to it); n: also the
            first n stages, or blocks. Output norms are always trained.
        with_cp: Recompute activations in the backward pass instead of keeping them.
        drop_path_rate: Stochastic depth of the last block, rising linearly from the first; the model's own if absent.
        norm_eval: Keep batch norms in evaluation mode, with their running statistics, while training.
        img_size: Size in pixels for which the position embedding is kept; images of any size are taken (the embedding
            is interpolated for others).
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH or URL)``: weights of a classifier, detector or segmentor,
            from the authors or from this project, see :func:`visionmamba.openmmlab.weights.fit_weights`; the word
            ``"published"`` in place of a path stands for the classifier that the authors published. Without it, the
            authors' random initialisation.
        **model_args: Arguments of the model's constructor.

    Raises:
        ValueError: An argument is not as described.
    """

    adapter_parts: tuple[str, ...] = ()
    """How the names of parameters begin that belong to no model of the zoo, see :class:`VisionMambaAdapter`."""

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        out_norm: bool | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        norm_eval: bool = False,
        img_size: int | tuple[int, int] | None = None,
        init_cfg: dict | list | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg=_check_init_cfg(init_cfg))
        family = _check_name(model_name)
        if drop_path_rate is not None:
            model_args["drop_path_rate"] = drop_path_rate
        self.model_name, self.img_size, self.norm_eval = model_name, img_size, norm_eval
        self.model_args = {**_ANY_SIZE.get(family, {}), **model_args}
        self.model = self.create_model()
        depth = len(self.model.feature_info)
        self.out_indices = self._check_indices(out_indices, depth)
        self.num_features = [self.model.feature_info[i]["num_chs"] for i in self.out_indices]
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        self.model.set_grad_checkpointing(with_cp)

        out_norm = family in _OUT_NORM_EPS if out_norm is None else out_norm
        norm_layer = partial(nn.LayerNorm, eps=_OUT_NORM_EPS.get(family, 1e-5))
        self.out_norms = OutputNorms(self.num_features, norm_layer) if out_norm else None
        self.final_norm_is_output = bool(out_norm) and family == "plainmamba" and self.out_indices[-1] == depth - 1

        if not -1 <= frozen_stages <= len(self.stages):
            raise ValueError(f"frozen_stages: expected -1 to {len(self.stages)}, got {frozen_stages}")
        self.frozen_stages = frozen_stages
        self._freeze()

    def create_model(self, **kwargs: Any) -> nn.Module:
        """Return the whole classifier that this backbone is a part of.

        Args:
            **kwargs: Arguments of timm's ``create_model`` beside this backbone's own.
        """
        model = timm.create_model(self.model_name, **self.model_args, **kwargs)
        model.set_input_size(img_size=self.img_size)
        return model

    @property
    def checkpoint_filter_fn(self) -> Callable:
        """The family's conversion of checkpoints."""
        return sys.modules[type(self.model).__module__].checkpoint_filter_fn

    @property
    def stages(self) -> nn.Module:
        """The stages, or a plain model's blocks."""
        return self.model.stages if hasattr(self.model, "stages") else self.model.blocks

    def _check_indices(self, out_indices: Sequence[int] | None, depth: int) -> tuple[int, ...]:
        if out_indices is None:
            plain = not hasattr(self.model, "stages") and depth > _PLAIN_OUTPUTS
            count = _PLAIN_OUTPUTS if plain else depth
            return tuple(depth * (i + 1) // count - 1 for i in range(count))
        indices = tuple(out_indices)
        valid = all(isinstance(i, int) and 0 <= i < depth for i in indices)
        if not indices or not valid or list(indices) != sorted(set(indices)):
            raise ValueError(f"out_indices: expected increasing numbers from 0 to {depth - 1}, got {out_indices!r}")
        return indices

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``; the model has initialised itself otherwise.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit, but for what only classifiers have.
        """
        if self.init_cfg is not None and not self.is_init:
            self.load_weights(self.init_cfg["checkpoint"])
        self.is_init = True

    def load_weights(self, checkpoint: str) -> None:
        """Load a classifier's, detector's or segmentor's checkpoint.

        Args:
            checkpoint: Path, URL or ``"published"``.
        """
        weights = fit_weights(read_weights(checkpoint, self.model_name), self)
        missing, _ = self.load_state_dict(weights, strict=False)
        parts = sorted({key.partition(".")[0] for key in missing})
        note = f"; not in it, at their initial values: {', '.join(parts)}" if parts else ""
        print_log(f"{self.model_name}: loaded {checkpoint}{note}", logger="current", level=logging.INFO)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        names = ("stages", "blocks", "norm")
        stem = [module for name, module in self.model.named_children() if name not in names]
        return [*stem, *self.stages[: self.frozen_stages]]

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for parameter in self.model.parameters(recurse=False):  # position embedding, class token
            parameter.requires_grad = False
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> VisionMambaBackbone:
        """Set the mode of training; what is frozen stays in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.eval()
            for module in self.modules():
                if self.norm_eval and isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _check_images(self, x: torch.Tensor) -> None:
        least = self.model.feature_info[0]["reduction"] if hasattr(self.model, "stages") else 1
        if x.dim() != 4 or min(x.shape[2], x.shape[3]) < least:
            raise ValueError(
                f"x: expected images (B, channels, height, width) of at least {least} pixels a side, "
                f"got shape {list(x.shape)}"
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return feature maps.

        Args:
            x: Images ``(B, in_chans, height, width)`` of any size.

        Returns:
            One contiguous map ``(B, C, H, W)`` for each of ``out_indices``.

        Raises:
            ValueError: There are no pixels, or less than one patch where the model does not pad.
        """
        self._check_images(x)
        features = self.model.forward_intermediates(
            x, indices=list(self.out_indices), stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if self.out_norms is not None:
            return tuple(self.out_norms(features))
        return tuple(feature.contiguous() for feature in features)
