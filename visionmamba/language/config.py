"""Configuration of a Mamba language model: mamba_ssm's fields, and Hugging Face's mapped to them and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["MambaConfig"]

_HF_CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


@dataclass
class MambaConfig:
    """Configuration of :class:`visionmamba.language.MambaLMHeadModel`.

    Args:
        d_model: Width.
        d_intermediate: Width of the gated MLP after each mixer; 0 for none.
        n_layer: Layers.
        vocab_size: Size of the vocabulary, before padding.
        ssm_cfg: ``layer`` (``"Mamba1"``, ``"Mamba2"``, or ``"S4D"`` for comparisons) and that block's arguments.
        attn_layer_idx: Layers that are attention instead.
        attn_cfg: Their arguments.
        rms_norm: RMSNorm instead of LayerNorm.
        residual_in_fp32: Keep the residual stream in float32.
        fused_add_norm: Kept for compatibility: the addition is always fused with the norm.
        pad_vocab_size_multiple: The embedding has a multiple of this many rows.
        tie_embeddings: The output layer is the embedding.

    Raises:
        ValueError: ``ssm_cfg["layer"]`` is unknown, or ``attn_layer_idx`` names no layer.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.layer not in ("Mamba1", "Mamba2", "S4D"):
            raise ValueError(f"ssm_cfg: expected layer 'Mamba1', 'Mamba2' or 'S4D', got {self.layer!r}")
        if any(not 0 <= index < self.n_layer for index in self.attn_layer_idx):
            raise ValueError(f"attn_layer_idx: expected indices below {self.n_layer}, got {self.attn_layer_idx}")

    @property
    def layer(self) -> str:
        """``"Mamba1"``, ``"Mamba2"`` or ``"S4D"``."""
        return self.ssm_cfg.get("layer", "Mamba1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as mamba_ssm writes them to ``config.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MambaConfig:
        """Read a ``config.json`` of mamba_ssm's or Hugging Face's layout.

        Args:
            values: The parsed file.

        Raises:
            ValueError: It describes no Mamba, or has fields that are not known.
        """
        if "model_type" in values:
            return cls._from_huggingface(values)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config: unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def _from_huggingface(cls, values: Mapping[str, Any]) -> MambaConfig:
        kind = values["model_type"]
        if kind not in _HF_CLASSES:
            raise ValueError(f"config: expected model_type 'mamba' or 'mamba2', got {kind!r}")
        d_model = values.get("hidden_size", 768 if kind == "mamba" else 4096)
        ssm_cfg: dict[str, Any] = {"layer": "Mamba1" if kind == "mamba" else "Mamba2"}
        names = {"expand": "expand", "conv_kernel": "d_conv", "use_bias": "bias", "use_conv_bias": "conv_bias"}
        names["state_size"] = "d_state"
        if kind == "mamba":
            names["time_step_rank"] = "dt_rank"
        else:
            names |= {"head_dim": "headdim", "n_groups": "ngroups", "chunk_size": "chunk_size"}
            names["time_step_limit"] = "dt_limit"
            ssm_cfg |= {"ngroups": 8}
        if values.get("rms_norm", True) is False and kind == "mamba2":
            ssm_cfg["rmsnorm"] = False
        ssm_cfg |= {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
        if "dt_limit" in ssm_cfg:
            ssm_cfg["dt_limit"] = tuple(float(bound) for bound in ssm_cfg["dt_limit"])
        if kind == "mamba2" and "num_heads" in values:
            d_ssm = values["num_heads"] * ssm_cfg.get("headdim", 64)
            if d_ssm != int(ssm_cfg.get("expand", 2) * d_model):
                raise ValueError(
                    f"config: expected num_heads * head_dim to be expand * hidden_size, got {d_ssm} channels in heads"
                )
        if values.get("layer_norm_epsilon", 1e-5) != 1e-5:
            raise ValueError(f"config: expected layer_norm_epsilon 1e-5, got {values['layer_norm_epsilon']}")
        return cls(
            d_model=d_model,
            n_layer=values.get("num_hidden_layers", 32 if kind == "mamba" else 64),
            vocab_size=values.get("vocab_size", 50280 if kind == "mamba" else 32768),
            ssm_cfg=ssm_cfg,
            residual_in_fp32=values.get("residual_in_fp32", True),
            pad_vocab_size_multiple=1,
            tie_embeddings=values.get("tie_word_embeddings", kind == "mamba"),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """Return the ``config.json`` of the same model in Hugging Face's layout.

        Raises:
            ValueError: Hugging Face's Mamba classes have no such model (hybrids, LayerNorm, ``d_ssm``, ``D_has_hdim``).
        """
        if self.layer == "S4D":
            raise ValueError("config: Hugging Face has no S4D")
        cfg = dict(self.ssm_cfg)
        kind = "mamba" if self.layer == "Mamba1" else "mamba2"
        unsupported = [name for name in ("d_ssm", "D_has_hdim", "norm_before_gate") if cfg.get(name)]
        unsupported += ["d_intermediate"] if self.d_intermediate else []
        unsupported += ["attn_layer_idx"] if self.attn_layer_idx else []
        unsupported += [] if self.rms_norm else ["rms_norm=False"]
        unsupported += ["rmsnorm=False"] if cfg.get("rmsnorm", True) is False else []
        if unsupported:
            raise ValueError(f"config: Hugging Face's {_HF_CLASSES[kind]} has no {', '.join(unsupported)}")
        expand = cfg.get("expand", 2)
        values = {
            "model_type": kind,
            "architectures": [_HF_CLASSES[kind]],
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layer,
            "vocab_size": self.padded_vocab_size,
            "state_size": cfg.get("d_state", 16 if kind == "mamba" else 128),
            "expand": expand,
            "conv_kernel": cfg.get("d_conv", 4),
            "use_bias": cfg.get("bias", False),
            "use_conv_bias": cfg.get("conv_bias", True),
            "hidden_act": "silu",
            "layer_norm_epsilon": 1e-5,
            "residual_in_fp32": self.residual_in_fp32,
            "tie_word_embeddings": self.tie_embeddings,
        }
        rank = cfg.get("dt_rank", "auto")
        if kind == "mamba":
            values["intermediate_size"] = int(expand * self.d_model)
            values["time_step_rank"] = math.ceil(self.d_model / 16) if rank == "auto" else rank
        else:
            headdim = cfg.get("headdim", 64)
            values |= {
                "head_dim": headdim, "num_heads": int(expand * self.d_model) // headdim,
                "n_groups": cfg.get("ngroups", 1), "chunk_size": cfg.get("chunk_size", 256), "rms_norm": True,
                "time_step_limit": list(cfg.get("dt_limit", (0.0, float("inf")))),
            }  # fmt: skip
        return values
