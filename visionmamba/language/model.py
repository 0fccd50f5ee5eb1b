"""Mamba language models: blocks, backbone and head, with mamba_ssm's names and state-dict layout."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import checkpoint
from .attention import MHA, GatedMLP
from .config import MambaConfig
from .generation import GenerationMixin, check_ids
from .inference import InferenceParams
from .mamba import Mamba
from .mamba2 import Mamba2
from .norms import RMSNorm, add_norm
from .state_space import S4DMixer

__all__ = ["Block", "CausalLMOutput", "MambaLMHeadModel", "MixerModel", "create_block"]

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2, "S4D": S4DMixer}
_PUBLISHED_SCALE = {"n_residuals_per_layer": 1}
"""The published hybrids count one residual branch a layer although their MLPs make it two."""

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


class Block(nn.Module):
    """One layer: add to the residual stream, normalise, mix; and again with the MLP where there is one.

    The block returns its mixer's (or MLP's) output and the residual stream separately: the next block's norm adds them.

    Args:
        dim: Width.
        mixer_cls: Makes the mixer from the width.
        mlp_cls: Makes the MLP from the width; ``nn.Identity`` for none.
        norm_cls: Makes a norm from the width.
        fused_add_norm: Kept for compatibility: the addition is always fused with the norm.
        residual_in_fp32: Keep the residual stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        else:
            self.mlp = None

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            hidden_states: Output of the previous layer, ``(B, L, D)``.
            residual: Residual stream before it; None at the first layer.
            inference_params: Cache of the mixer.
            **mixer_kwargs: Passed to the mixer (``seq_idx``, ``cu_seqlens``).

        Returns:
            This layer's output, and the residual stream before it.
        """
        hidden_states, residual = add_norm(hidden_states, residual, self.norm, self.residual_in_fp32)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(hidden_states, residual, self.norm2, self.residual_in_fp32)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        """Return the mixer's empty states."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: Sequence[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device=None,
    dtype=None,
) -> Block:
    """Create a layer; see :class:`MixerModel` for the arguments.

    Raises:
        ValueError: ``ssm_cfg["layer"]`` is unknown.
    """
    dd = {"device": device, "dtype": dtype}
    ssm_cfg = dict(ssm_cfg or {})
    kind = ssm_cfg.pop("layer", "Mamba1")
    if kind not in _MIXERS:
        raise ValueError(f"ssm_cfg: expected layer 'Mamba1', 'Mamba2' or 'S4D', got {kind!r}")
    if layer_idx in (attn_layer_idx or ()):
        mixer = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **dd)
    else:
        mixer = partial(_MIXERS[kind], layer_idx=layer_idx, **ssm_cfg, **dd)
    mlp = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **dd)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **dd)
    return Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)


@torch.no_grad()
def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise as the published models were.

    The last layers of residual branches are scaled by 1 / sqrt(n_residuals_per_layer * n_layer) (Radford et al. 2019).
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if part.bias is not None and not getattr(part.bias, "_no_reinit", False):
                nn.init.zeros_(part.bias)
            if rescale_prenorm_residual and name.rsplit(".", 1)[-1] in ("out_proj", "fc2"):
                nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5))
                part.weight /= math.sqrt(n_residuals_per_layer * n_layer)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=initializer_range)


class MixerModel(nn.Module):
    """Embedding, layers and the last norm.

    Args:
        d_model: Width.
        n_layer: Layers.
        d_intermediate: Width of the gated MLP after each mixer; 0 for none.
        vocab_size: Rows of the embedding.
        ssm_cfg: ``layer`` (``"Mamba1"``, ``"Mamba2"``, or ``"S4D"`` for comparisons) and that block's arguments.
        attn_layer_idx: Layers that are attention instead.
        attn_cfg: Their arguments.
        norm_epsilon: Added to the mean square (variance) in the norms.
        rms_norm: RMSNorm instead of LayerNorm.
        initializer_cfg: Arguments of the initialisation: ``initializer_range``, ``rescale_prenorm_residual``,
            ``n_residuals_per_layer`` (1, and 2 with MLPs, if absent).
        fused_add_norm: Kept for compatibility: the addition is always fused with the norm.
        residual_in_fp32: Keep the residual stream in float32.
        device: Where to create the parameters.
        dtype: Their dtype.

    Source:
        Interface and state-dict layout of mamba_ssm 2.3.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: Sequence[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.embedding = nn.Embedding(vocab_size, d_model, **dd)
        block = partial(
            create_block, d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
            residual_in_fp32, fused_add_norm, **dd,
        )  # fmt: skip
        self.layers = nn.ModuleList([block(layer_idx=index) for index in range(n_layer)])
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **dd)
        if not self.embedding.weight.is_meta:
            residuals = {"n_residuals_per_layer": 2 if d_intermediate else 1}
            _init_weights(self, n_layer, **(residuals | (initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict[int, Any]:
        """Return every layer's empty states by layer index."""
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs) -> Tensor:
        """Return the normalised output of the last layer, ``(B, L, D)``.

        Args:
            input_ids: ``(B, L)`` integer.
            inference_params: Cache to continue from and to update.
            **mixer_kwargs: Passed to every mixer (``seq_idx``, ``cu_seqlens``).
        """
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params, **mixer_kwargs)
        return add_norm(hidden_states, residual, self.norm_f, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A Mamba language model.

    Args:
        config: Its configuration.
        initializer_cfg: Arguments of the initialisation: ``initializer_range``, ``rescale_prenorm_residual``,
            ``n_residuals_per_layer`` (1 as in the published hybrids, although MLPs make it 2).
        device: Where to create the parameters.
        dtype: Their dtype.

    Source:
        Interface and state-dict layout of mamba_ssm 2.3.
    """

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.config = config
        dd = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, config.padded_vocab_size, config.ssm_cfg,
            config.attn_layer_idx, config.attn_cfg, rms_norm=config.rms_norm,
            initializer_cfg=_PUBLISHED_SCALE | (initializer_cfg or {}), fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32, **dd,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **dd)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output layer the embedding where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict[int, Any]:
        """Return every layer's empty states by layer index."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs,
    ) -> CausalLMOutput:
        """Compute logits.

        Args:
            input_ids: ``(B, L)`` integer ids.
            position_ids: Kept for compatibility: the recurrence needs no positions.
            inference_params: Cache to continue from and to update.
            num_last_tokens: Compute logits of the last tokens only; of all for 0.
            **mixer_kwargs: ``seq_idx`` (B, L) or ``cu_seqlens`` (S + 1,) for packed sequences.

        Returns:
            ``logits``, ``(B, L, padded vocabulary)``.

        Raises:
            ValueError: There are no tokens, or (on a CPU, where looking costs nothing) ids outside of the vocabulary.
        """
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids: expected (B, L) with at least one token, got shape {tuple(input_ids.shape)}")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_ids("input_ids", input_ids, self.config.padded_vocab_size)
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str | Path, device=None, dtype=None, **kwargs) -> MambaLMHeadModel:
        """Load a published or saved model.

        Args:
            pretrained_model_name: A folder, or a repository of the Hugging Face hub (``state-spaces/mamba2-130m``),
                with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (or their shards), in the
                layout of mamba_ssm or Hugging Face.
            device: Where to put the model.
            dtype: Dtype of its parameters.
            **kwargs: Passed to the constructor.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: The weights do not fit the configuration; the message says where.
            FileNotFoundError: A file is missing.
            CheckpointError: A file cannot be read, or holds code.
        """
        source = checkpoint.Source(pretrained_model_name)
        config = MambaConfig.from_dict(source.config())
        with torch.device("meta"):
            model = cls(config, dtype=dtype, **kwargs)
        model.to_empty(device=device or "cpu")
        model.tie_weights()
        checkpoint.load(model, source.state_dict())
        return model.eval()

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, layout: str = "mamba_ssm"
    ) -> None:
        """Write ``config.json`` and the weights.

        Args:
            save_directory: Folder; created if absent.
            safe_serialization: ``model.safetensors`` instead of ``pytorch_model.bin``.
            layout: ``"mamba_ssm"`` or ``"huggingface"``.

        Raises:
            ValueError: The layout is unknown or has no such model.
        """
        checkpoint.save(self, Path(save_directory), safe_serialization, layout)
