"""Mamba language models: blocks, backbone and head, with mamba_ssm's names and state-dict layout."""

from __future__ import annotations

import math
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import checkpoint
from .attention import MHA, GatedMLP
from .config import MambaConfig
from .generation import GenerationMixin
from .inference import InferenceParams
from .mamba import Mamba
from .mamba2 import Mamba2
from .norms import LayerNorm, RMSNorm, add_norm
from .state_space import S4DMixer

__all__ = ["Block", "CausalLMOutput", "MambaLMHeadModel", "MixerModel"]

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2, "S4D": S4DMixer}

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
        self, dim: int, mixer_cls, mlp_cls=nn.Identity, norm_cls=LayerNorm, fused_add_norm=True, residual_in_fp32=False
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


def _create_block(config: MambaConfig, layer_idx: int, dd: dict[str, Any]) -> Block:
    ssm_cfg = {name: value for name, value in config.ssm_cfg.items() if name != "layer"}
    if layer_idx in config.attn_layer_idx:
        mixer = partial(MHA, layer_idx=layer_idx, **config.attn_cfg, **dd)
    else:
        mixer = partial(_MIXERS[config.layer], layer_idx=layer_idx, **ssm_cfg, **dd)
    mlp = nn.Identity
    if config.d_intermediate:
        mlp = partial(GatedMLP, hidden_features=config.d_intermediate, out_features=config.d_model, **dd)
    norm = partial(RMSNorm if config.rms_norm else LayerNorm, **dd)
    return Block(config.d_model, mixer, mlp, norm, config.fused_add_norm, config.residual_in_fp32)


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
    The published hybrids count one residual branch a layer although their MLPs make it two; pass 2 for the intended
    scale.
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
        config: The model's configuration.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, config: MambaConfig, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **dd)
        self.layers = nn.ModuleList([_create_block(config, index, dd) for index in range(config.n_layer)])
        self.norm_f = (RMSNorm if config.rms_norm else LayerNorm)(config.d_model, **dd)

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
            ``n_residuals_per_layer``.
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
        self.backbone = MixerModel(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        if not self.lm_head.weight.is_meta:
            _init_weights(self, config.n_layer, **(initializer_cfg or {}))
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
            ValueError: There are no tokens.
        """
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids: expected (B, L) with at least one token, got shape {tuple(input_ids.shape)}")
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
