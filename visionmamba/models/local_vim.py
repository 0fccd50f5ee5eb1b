"""LocalVim: Vim with windows among its scan directions, chosen for each layer by a search.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al. 2024,
https://arxiv.org/abs/2403.09338
Official code and weights (Apache-2.0): https://github.com/hunto/LocalMamba

Written from the paper and from published facts about the official models (names, shapes, hyperparameters); the weights
are the authors'. The backbone is Vim's; :class:`visionmamba.layers.LocalScan` is what is new.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model

from ..layers import GatedMixer, LocalScan, axial_rope_table, check_choice, insert_class_token, remove_class_token
from ..layers.grid_embed import resize_grid_embed
from ._builder import build_model
from ._checkpoint import CheckpointError
from .local_vmamba import UNSEARCHED, check_directions
from .vim import Vim

__all__ = ["LocalVim", "LocalVimMixer", "checkpoint_filter_fn", "official_state_dict"]

Tensors = dict[str, torch.Tensor]

torch.fx.wrap("resize_grid_embed")  # FX looks for leaf functions where forward is defined, and that is the base's


class LocalVimMixer(GatedMixer):
    """LocalVim's token mixer: a gated scan along the layer's own directions.

    Args:
        dim: Channels of the tokens, C.
        path: The directions, and ``|cls`` after them if a class token is in the middle of the tokens.
        expand: Channels inside relative to C.
        d_state: States a channel, N.
        d_conv: Taps of the causal convolution along each direction.
        dt_rank: Rank of the step sizes; ``ceil(C / 16)`` if absent.
        search: Merge as the supernet of the direction search does.
        realign_columns: See :class:`LocalScan`.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        path: str,
        expand: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        search: bool = False,
        realign_columns: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dt_rank = dt_rank or math.ceil(dim / 16)
        merge = dict(search=search, realign_columns=realign_columns)
        super().__init__(
            dim, lambda d_inner: LocalScan(d_inner, d_state, dt_rank, path, d_conv, **merge, **dd), expand, **dd
        )


def _resize_pos_embed(embed: torch.Tensor, old: list[int], grid: list[int], class_token: str) -> torch.Tensor:
    """Interpolate the patches' rows ``(1, L, C)`` to another grid, bicubically as the authors do, around a class token.

    Args:
        embed: Position embedding.
        old: Its grid.
        grid: The new grid.
        class_token: ``"middle"``, or ``""`` for none.
    """
    resized = resize_grid_embed(remove_class_token(embed, class_token).unflatten(1, old), grid).flatten(1, 2)
    if class_token == "":
        return resized
    middle = old[0] * old[1] // 2
    return insert_class_token(resized, embed[:, middle : middle + 1], class_token)


class LocalVim(Vim):
    """LocalVim; defaults are those of the unsearched tiny model. It takes images of any size.

    Args:
        img_size: Image size that the position embedding is made for.
        directions: Scan path of each layer, one for all, or None for the authors' unsearched one.
        search: Build the supernet of the direction search: all eight directions in every layer, weighed by softmax.
        realign_columns: On images that are not square, put the outputs of column directions on their own tokens; the
            official code does not, see :class:`visionmamba.layers.LocalScan`.
        rope_resize: The rotary embedding on another grid: ``"official"`` interpolates cosines and sines, each by
            itself, after which they are no longer rotations; ``"recompute"`` computes them for the grid.
        init_dt: Initialise step sizes as Mamba does. The published models begin with a bias of 0, a step of about 0.69
            instead of 0.001 to 0.1.
        depth: Number of blocks.
        class_token: ``"middle"``, or ``""`` for none.
        global_pool: ``"avg"`` of the patch tokens, ``"token"`` the class token, as for :class:`Vim`.
        rope: ``"stream"`` to rotate the residual stream before each block, or ``""``.
        **kwargs: Other arguments of :class:`Vim`, but for ``directions``, ``paired`` and ``layer_scale``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        directions: str | Sequence[str] | None = None,
        search: bool = False,
        realign_columns: bool = False,
        rope_resize: str = "official",
        init_dt: bool = False,
        depth: int = 20,
        class_token: str = "",
        global_pool: str = "avg",
        rope: str = "stream",
        **kwargs: Any,
    ) -> None:
        check_choice("rope_resize", rope_resize, ("official", "recompute"))
        check_choice("class_token", class_token, ("", "middle"))
        self._paths = check_directions(directions, depth, search)
        self._mixer = dict(search=search, realign_columns=realign_columns)
        self.search, self.rope_resize, self.init_dt = search, rope_resize, init_dt
        super().__init__(
            img_size, depth=depth, class_token=class_token, global_pool=global_pool, rope=rope, directions="sum",
            dynamic_img_size=True, dynamic_img_pad=True, **kwargs,
        )  # fmt: skip

    def create_mixer(self, index: int, directions: str, reverse: bool, layer_scale: None, **mixer: Any) -> nn.Module:
        """Return the token mixer of a block, along its own directions."""
        path = self._paths[index] + ("|cls" if self.class_token else "")
        return LocalVimMixer(path=path, **self._mixer, **mixer)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do: linear layers truncated normal of 0.02, everything else as Vim.

        Args:
            needs_reset: Also reset what initialises itself when it is constructed (after a model was made on ``meta``).
        """
        super().init_weights(needs_reset)
        mixers = [module for module in self.modules() if isinstance(module, LocalVimMixer)]
        for mixer in mixers:
            for module in mixer.modules():
                if isinstance(module, nn.Linear) and module is not mixer.out_proj:
                    trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            trunc_normal_(mixer.ssm.directions.x_proj_weight, std=0.02)
            if not self.init_dt:
                trunc_normal_(mixer.ssm.directions.dt_proj_weight, std=0.02)
                nn.init.zeros_(mixer.ssm.directions.dt_proj_bias)
            with torch.no_grad():
                mixer.out_proj.weight /= len(mixers) ** 0.5

    def _grid_and_pos_embed(self, x: torch.Tensor) -> tuple[list[int], torch.Tensor | None]:
        """Return the patch grid of images and its position embedding, whatever their size."""
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        return [rows, columns], self._pos_embed_for((rows, columns))

    def _pos_embed_for(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """Return the position embedding for a patch grid."""
        if self.pos_embed is None:
            return None
        rows, columns = self.patch_embed.grid_size
        return _resize_pos_embed(self.pos_embed, [rows, columns], [grid[0], grid[1]], self.class_token)

    def _rope_table(self, grid: list[int], device: torch.device) -> torch.Tensor:
        if self.rope_resize == "recompute":
            return axial_rope_table(self.embed_dim, grid, None, self.rope_reference_size, device=device)
        rows, columns = self.patch_embed.grid_size
        table = axial_rope_table(self.embed_dim, [rows, columns], None, self.rope_reference_size, device=device)
        channels = table.transpose(0, 1).reshape(1, rows, columns, self.embed_dim)  # cosines, then sines
        return resize_grid_embed(channels, grid).flatten(0, 2).unflatten(1, [2, -1]).transpose(0, 1)


_SSM_NAMES = {
    "A_log": "A_log_{}",
    "D": "D_{}",
    "conv_weight": "conv1d_{}.weight",
    "conv_bias": "conv1d_{}.bias",
    "x_proj_weight": "x_proj_{}.weight",
    "dt_proj_weight": "dt_proj_{}.weight",
    "dt_proj_bias": "dt_proj_{}.bias",
}
"""Our stacked parameters, and the official names of each direction's."""

_NAMES = {
    "mixer.ssm.merge.attention.norm.": "mixer.attn.norm.",
    "mixer.ssm.merge.attention.reduce.": "mixer.attn.global_reduce.",
    "mixer.ssm.merge.attention.expand.": "mixer.attn.channel_select.",
    "mixer.ssm.merge.weights": "mixer.multi_scan.weights",
    "blocks.": "layers.",
}


def _official_name(name: str) -> str:
    """Return the official name of a parameter that is not stacked."""
    if name.startswith("norm."):
        return f"norm_f.{name.removeprefix('norm.')}"
    for ours, official in _NAMES.items():
        name = name.replace(ours, official)
    return name


def official_state_dict(state_dict: Mapping[str, torch.Tensor], model: LocalVim) -> Tensors:
    """Convert our state dict (or gradients by parameter name) to the authors' names and shapes.

    Args:
        state_dict: Ours.
        model: The model it belongs to.

    Returns:
        Theirs; the inverse of :func:`checkpoint_filter_fn`.
    """
    official = {}
    for name, value in state_dict.items():
        block, stacked, leaf = name.partition("mixer.ssm.directions.")
        if not stacked:
            official[_official_name(name)] = value[:, None, None, None] if name.endswith("merge.weights") else value
            continue
        parts = value.unsqueeze(2) if leaf == "conv_weight" else value  # (K, D, 1, W)
        for k, part in enumerate(parts):
            official[f"{_official_name(block)}mixer.{_SSM_NAMES[leaf].format(k)}"] = part
    return official


def _from_official(state_dict: Tensors, model: LocalVim) -> Tensors:
    """Convert an official state dict; what has no counterpart keeps its name.

    The directions' ``A_log`` share one memory in the authors' models: a checkpoint holds the same values for each, and
    where it does not, the last direction's are what the models compute with.
    """
    remaining, converted = dict(state_dict), {}
    for name, parameter in model.state_dict().items():
        names = list(official_state_dict({name: parameter}, model))
        if not all(key in remaining for key in names):
            continue
        parts = [remaining.pop(key) for key in names]
        if name.endswith("mixer.ssm.directions.A_log"):
            converted[name] = torch.stack(parts[-1:] * len(parts))
        elif "mixer.ssm.directions." in name:
            converted[name] = torch.stack([part.squeeze(1) if name.endswith("conv_weight") else part for part in parts])
        else:
            converted[name] = parts[0].flatten() if name.endswith("merge.weights") else parts[0]
    return {**remaining, **converted}


def checkpoint_filter_fn(state_dict: Tensors, model: LocalVim) -> Tensors:
    """Convert a checkpoint to the model's state dict.

    Args:
        state_dict: The authors', or this project's own.
        model: The model it is for.

    Returns:
        Our names and shapes, without the tables of the rotary embedding, which the model computes; a position
        embedding of another grid is interpolated.
    """
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith("rope.")}
    if any(key.startswith("layers.") for key in state_dict):
        if model.search:  # the authors' supernet holds the attentions too, and merges without them
            state_dict = {key: value for key, value in state_dict.items() if ".mixer.attn." not in key}
        state_dict = _from_official(state_dict, model)
    embed = state_dict.get("pos_embed")
    if embed is not None and model.pos_embed is not None and embed.shape[1:2] != model.pos_embed.shape[1:2]:
        side = math.isqrt(embed.shape[1] - model.num_class_tokens)
        if side * side != embed.shape[1] - model.num_class_tokens:
            raise CheckpointError(f"pos_embed: expected rows for a square grid of patches, got {embed.shape[1]}")
        grid = list(model.patch_embed.grid_size)
        state_dict["pos_embed"] = _resize_pos_embed(embed, [side, side], grid, model.class_token)
    return state_dict


def _cfg(url: str = "", top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url, "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.875,
        "interpolation": "bicubic", "fixed_input_size": False, "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "paper_ids": "arXiv:2403.09338", "origin_url": "https://github.com/hunto/LocalMamba",
        "notes": () if top1 is None else (f"top1: {top1}",),
        **kwargs,
    }  # fmt: skip


_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"

default_cfgs = generate_default_cfgs({
    "local_vim_tiny.in1k": _cfg(f"{_RELEASE}/local_vim_tiny.ckpt", 76.2),
    "local_vim_tiny_middle_cls_token.in1k": _cfg(f"{_RELEASE}/local_vim_tiny_middle_cls_token.ckpt", 77.8),
    "local_vim_tiny_wo_search.untrained": _cfg(top1=75.8),
    "local_vim_small.in1k": _cfg(f"{_RELEASE}/local_vim_small.ckpt", 81.1),
    "local_vim_small_searched.in1k": _cfg(f"{_RELEASE}/local_vim_small.ckpt", 81.2),
    "local_vim_tiny_search.untrained": _cfg(),
    "test_local_vim.untrained": _cfg(input_size=(3, 64, 64)),
})  # fmt: skip

SEARCHED = (
    "h,v_flip,w7,w7_flip", "h_flip,w2_flip,w7,w7_flip", "h,h_flip,v,w7", "h,h_flip,v,v_flip", "h,h_flip,v,v_flip",
    "h,h_flip,v,v_flip", "h_flip,v,v_flip,w7", "h_flip,v,v_flip,w2_flip", "h,h_flip,v,v_flip", "h,h_flip,v,v_flip",
    "h,v,v_flip,w2", "h,v,v_flip,w2_flip", "h,h_flip,v_flip,w7", "h_flip,v,v_flip,w2", "h,h_flip,v,v_flip",
    "h,v,w2,w2_flip", "v,v_flip,w2,w7", "h,h_flip,v,w2", "h,h_flip,w2_flip,w7", "v,v_flip,w2,w2_flip",
)  # fmt: skip
"""The directions that the authors' search chose for the layers of the tiny model; the small one has the same."""


def _create_local_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model(LocalVim, variant, pretrained, checkpoint_filter_fn, **{"out_indices": 3, **kwargs})


@register_model
def local_vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T: 8 M parameters, 76.2 % top-1; searched directions."""
    model_args = dict(embed_dim=192, directions=SEARCHED)
    return _create_local_vim("local_vim_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_tiny_middle_cls_token(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle in place of the pooling and the rotary embedding: 77.8 % top-1."""
    model_args = dict(embed_dim=192, directions=SEARCHED, class_token="middle", global_pool="token", rope="")
    return _create_local_vim("local_vim_tiny_middle_cls_token", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_tiny_wo_search(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with the same directions in every layer: 75.8 % top-1 in the paper, no published weights."""
    model_args = dict(embed_dim=192, directions=UNSEARCHED)
    return _create_local_vim("local_vim_tiny_wo_search", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S: 28 M parameters, 81.1 % top-1; the same directions in every layer.

    The authors define this model twice, with and without searched directions; this is the definition that their code
    ends up with. A checkpoint cannot tell which it belongs to: see :func:`local_vim_small_searched`.
    """
    model_args = dict(embed_dim=384, directions=UNSEARCHED)
    return _create_local_vim("local_vim_small", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_small_searched(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S with searched directions, the authors' shadowed definition: 81.2 % top-1 in the paper."""
    model_args = dict(embed_dim=384, directions=SEARCHED)
    return _create_local_vim("local_vim_small_searched", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_tiny_search(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """Supernet of the direction search for LocalVim, 128 channels wide."""
    model_args = dict(embed_dim=128, search=True)
    return _create_local_vim("local_vim_tiny_search", pretrained, **dict(model_args, **kwargs))


@register_model
def test_local_vim(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """A micro model for tests and demonstrations: 0.1 M parameters."""
    directions = ("h,v_flip,w7,w7_flip", "h_flip,v,w2,w2_flip", "h,h_flip,v,v_flip")
    model_args = dict(img_size=64, patch_size=8, embed_dim=48, depth=3, d_state=4, directions=directions)
    return _create_local_vim("test_local_vim", pretrained, **dict(model_args, **kwargs))
