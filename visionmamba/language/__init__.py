"""Language models on the same core: state space models from HiPPO to S6, Mamba, Mamba-2, hybrids and generation."""

from .attention import MHA, GatedMLP
from .config import MambaConfig
from .generation import GenerateOutput, GenerationMixin
from .inference import InferenceParams
from .mamba import Mamba
from .mamba2 import Mamba2
from .model import Block, CausalLMOutput, MambaLMHeadModel, MixerModel
from .norms import LayerNorm, RMSNorm, RMSNormGated

__all__ = [
    "MHA",
    "Block",
    "CausalLMOutput",
    "GatedMLP",
    "GenerateOutput",
    "GenerationMixin",
    "InferenceParams",
    "LayerNorm",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "RMSNormGated",
]
