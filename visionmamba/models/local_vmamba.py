"""LocalVMamba: VMamba with windows among its scan directions, chosen for each layer by a search.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al. 2024,
https://arxiv.org/abs/2403.09338
Official code and weights (Apache-2.0): https://github.com/hunto/LocalMamba

Written from the paper and from published facts about the official models (names, shapes, hyperparameters); the weights
are the authors'. The backbone is VMamba's first version; :class:`visionmamba.layers.LocalScan` is what is new.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model

from ..layers import LOCAL_DIRECTIONS, SS2D, LayerNorm, LocalScan, before_linear
from ..layers.norm import add_norm
from . import _vmamba_official
from ._builder import build_model
from ._hierarchical import HierarchicalModel
from ._layout import from_official, rename

__all__ = ["LocalSS2D", "LocalVMamba", "check_directions", "checkpoint_filter_fn", "official_state_dict"]

Tensors = dict[str, torch.Tensor]

UNSEARCHED = "h,h_flip,w2,w2_flip"
"""The directions of the authors' models without search."""


def check_directions(directions: str | Sequence[str] | None, depth: int, search: bool) -> list[str]:
    """Return the scan path of each layer.

    Args:
        directions: One path for all layers, or one for each; None for the unsearched ones.
        depth: Number of layers.
        search: All directions in every layer, for the supernet.

    Raises:
        ValueError: The list does not fit the depth, or a direction is not LocalMamba's.
    """
    if search:
        return [",".join(LOCAL_DIRECTIONS)] * depth
    directions = UNSEARCHED if directions is None else directions
    paths = [directions] * depth if isinstance(directions, str) else list(directions)
    if len(paths) != depth:
        raise ValueError(f"directions: expected one path for each of the {depth} layers, got {len(paths)}")
    for path in paths:
        unknown = [name for name in path.split(",") if name not in LOCAL_DIRECTIONS]
        if unknown:
            raise ValueError(f"directions: expected some of {', '.join(LOCAL_DIRECTIONS)}, got {unknown[0]!r}")
    return paths


class LocalSS2D(SS2D):
    """SS2D along a layer's own directions, merged by channel attention; other arguments are SS2D's.

    Args:
        dim: Channels.
        path: The directions.
        search: Merge as the supernet of the direction search does.
        realign_columns: See :class:`LocalScan`.
        device: Where to create the parameters.
        dtype: Their dtype.
        **kwargs: SS2D's.
    """

    keeps_little = True

    def __init__(
        self,
        dim: int,
        path: str,
        search: bool = False,
        realign_columns: bool = False,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        self._local = dict(search=search, realign_columns=realign_columns)
        super().__init__(dim, path=path, device=device, dtype=dtype, **kwargs)

    def create_ssm(self, ssm: str, d_inner: int, d_state: int, dt_rank: int, path: str, **dd) -> nn.Module:
        """Return the state space models along the layer's directions."""
        return LocalScan(d_inner, d_state, dt_rank, path, **self._local, **dd)


class LocalVMambaBlock(nn.Module):
    """Pre-norm block: the token mixer alone, without an MLP.

    Args:
        dim: Channels.
        path: The layer's directions.
        drop_path: Rate of stochastic depth.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
        **mixer: Arguments of :class:`LocalSS2D`.
    """

    def __init__(
        self,
        dim: int,
        path: str,
        drop_path: float = 0.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
        **mixer: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = before_linear(norm_layer(dim, **dd))
        self.mixer = LocalSS2D(dim, path, norm_layer=norm_layer, **mixer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @torch.jit.unused
    def step(self, x: torch.Tensor, pending: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream without this block's addition, and that addition; see ``layers/joined_blocks.py``."""
        x, normed = add_norm(x, pending, self.norm1)
        return x, self.drop_path(self.mixer(normed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        return x + self.drop_path(self.mixer(self.norm1(x)))


class LocalVMamba(HierarchicalModel):
    """LocalVMamba; defaults are those of the unsearched ``local_vssm_tiny``.

    Args:
        depths: Blocks of each stage.
        dims: Channels of each stage, or of the first (they double then).
        directions: Scan path of each layer, one for all, or None for the authors' unsearched one.
        search: Build the supernet of the direction search: all eight directions in every layer, weighed by softmax.
        realign_columns: On images that are not square, put the outputs of column directions on their own tokens; the
            official code does not, see :class:`visionmamba.layers.LocalScan`.
        d_state: States a channel, N.
        ssm_ratio: Channels inside the token mixer relative to its input's.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
        **kwargs: Arguments of :class:`._hierarchical.HierarchicalModel`: ``patch_size``, ``in_chans``, ``num_classes``,
            ``global_pool``, ``drop_rate``, ``drop_path_rate``.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        directions: str | Sequence[str] | None = None,
        search: bool = False,
        realign_columns: bool = False,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        paths = iter(check_directions(directions, sum(depths), search))
        block = partial(
            LocalVMambaBlock, d_state=d_state, ssm_ratio=ssm_ratio, search=search, realign_columns=realign_columns,
            norm_layer=norm_layer, **dd,
        )  # fmt: skip
        super().__init__(
            lambda stage, dim, rate: block(dim, next(paths), drop_path=rate), depths, dims, **kwargs,
            norm_layer=norm_layer, **dd,
        )  # fmt: skip
        self.search = search
        self.init_unless_meta()


_NAMES = [
    ("ssm.directions.", "ssm."),
    ("ssm.merge.attention.norm.", "multi_scan.attn.norm."),
    ("ssm.merge.attention.reduce.", "multi_scan.attn.global_reduce."),
    ("ssm.merge.attention.expand.", "multi_scan.attn.channel_select."),
    ("ssm.merge.weights", "multi_scan.weights"),
]
"""What is called otherwise than in VMamba: our names, and VMamba's or the authors'."""


def official_state_dict(state_dict: Mapping[str, torch.Tensor], model: LocalVMamba) -> Tensors:
    """Convert our state dict (or gradients by parameter name) to the authors' names and shapes.

    Args:
        state_dict: Ours.
        model: The model it belongs to.

    Returns:
        Theirs; the inverse of :func:`checkpoint_filter_fn`.
    """
    renamed = {
        rename(name, _NAMES): value[:, None, None, None] if name.endswith("merge.weights") else value
        for name, value in state_dict.items()
    }
    return _vmamba_official.official_state_dict(renamed, model)


def checkpoint_filter_fn(state_dict: Tensors, model: LocalVMamba) -> Tensors:
    """Convert a checkpoint to the model's state dict.

    Args:
        state_dict: The authors', or this project's own.
        model: The model it is for.

    Returns:
        Our names and shapes; what is not known is passed on as it is.
    """
    if any(key.startswith("stages.") for key in state_dict):
        return state_dict
    if model.search:  # the authors' supernet holds the attentions too, and merges without them
        state_dict = {key: value for key, value in state_dict.items() if ".multi_scan.attn." not in key}
    return from_official(state_dict, model, official_state_dict, "head.fc", "classifier.head")


def _cfg(url: str = "", top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url, "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
        "interpolation": "bicubic", "fixed_input_size": False, "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj", "classifier": "head.fc",
        "license": "apache-2.0", "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "paper_ids": "arXiv:2403.09338", "origin_url": "https://github.com/hunto/LocalMamba",
        "notes": () if top1 is None else (f"top1: {top1}",),
        **kwargs,
    }  # fmt: skip


_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"

default_cfgs = generate_default_cfgs({
    "local_vssm_tiny.in1k": _cfg(f"{_RELEASE}/local_vssm_tiny.ckpt", 82.7),
    "local_vssm_small.in1k": _cfg(f"{_RELEASE}/local_vssm_small.ckpt", 83.7),
    "local_vssm_tiny_search.untrained": _cfg(),
    "local_vssm_small_search.untrained": _cfg(),
    "test_local_vmamba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})  # fmt: skip

TINY_DIRECTIONS = (
    "h,h_flip,w7,w7_flip", "h_flip,v_flip,w2,w2_flip",
    "h_flip,v_flip,w2_flip,w7", "h_flip,v,v_flip,w2",
    "h,h_flip,v_flip,w2_flip", "h_flip,v_flip,w2,w2_flip", "h,w2_flip,w7,w7_flip", "h,h_flip,v,v_flip",
    "h,v_flip,w7,w7_flip", "h_flip,v,w2,w7_flip", "v,v_flip,w2,w7_flip", "h,h_flip,v_flip,w2_flip",
    "v_flip,w2_flip,w7,w7_flip",
    "h_flip,v_flip,w2_flip,w7_flip", "h_flip,v,w7,w7_flip",
)  # fmt: skip
"""The directions that the authors' search chose for the tiny model's layers."""


def _create_local_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    every_stage = tuple(range(len(kwargs["depths"])))
    return build_model(LocalVMamba, variant, pretrained, checkpoint_filter_fn, **{"out_indices": every_stage, **kwargs})


@register_model
def local_vssm_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T: 26 M parameters, 5.7 G, 82.7 % top-1; searched directions."""
    model_args = dict(depths=(2, 2, 9, 2), dims=96, directions=TINY_DIRECTIONS)
    return _create_local_vmamba("local_vssm_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vssm_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S: 50 M parameters, 11.4 G, 83.7 % top-1.

    The authors' weights belong to directions that their search chose, and names and shapes cannot tell which: loading
    weights needs ``directions``, one path for each of the 33 layers. Without weights, the unsearched ones are built.

    Raises:
        ValueError: ``pretrained`` without ``directions``.
    """
    if pretrained and kwargs.get("directions") is None:
        raise ValueError(
            "directions: expected the 33 scan paths that the weights were trained with (create_model(..., "
            "directions=[...])), got none; the checkpoint itself does not tell them"
        )
    model_args = dict(depths=(2, 2, 27, 2), dims=96)
    return _create_local_vmamba("local_vssm_small", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vssm_tiny_search(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """Supernet of the direction search for LocalVMamba-T, a third as wide: 4.3 M parameters."""
    model_args = dict(depths=(2, 2, 9, 2), dims=32, search=True)
    return _create_local_vmamba("local_vssm_tiny_search", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vssm_small_search(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """Supernet of the direction search for LocalVMamba-S, a third as wide: 8.5 M parameters."""
    model_args = dict(depths=(2, 2, 27, 2), dims=32, search=True)
    return _create_local_vmamba("local_vssm_small_search", pretrained, **dict(model_args, **kwargs))


@register_model
def test_local_vmamba(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """A micro model for tests and demonstrations: 0.3 M parameters."""
    directions = ("h,h_flip,w7,w7_flip", "h,v_flip,w2,w2_flip", "v,v_flip,w2,w7_flip", "h,h_flip,v,v_flip")
    model_args = dict(depths=(1, 1, 1, 1), dims=(24, 48, 64, 96), d_state=4, directions=directions)
    return _create_local_vmamba("test_local_vmamba", pretrained, **dict(model_args, **kwargs))
