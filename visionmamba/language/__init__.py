"""Language models on the same core: state space models from HiPPO to S6, Mamba, Mamba-2, hybrids and generation."""

from .attention import MHA, GatedMLP
from .config import MambaConfig
from .generation import GenerateOutput, GenerationMixin, decode, sample
from .inference import InferenceParams
from .mamba import Mamba
from .mamba2 import Mamba2
from .model import Block, CausalLMOutput, MambaLMHeadModel, MixerModel, create_block
from .norms import RMSNorm, RMSNormGated

__all__ = [
    "MHA",
    "Block",
    "CausalLMOutput",
    "GatedMLP",
    "GenerateOutput",
    "GenerationMixin",
    "InferenceParams",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "RMSNormGated",
    "create_block",
    "decode",
    "sample",
]
