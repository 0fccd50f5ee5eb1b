"""Building blocks that the families share."""

from .output_norms import OutputNorms
from .patch import ChannelsLastConv2d, ConvDownsample, ConvPatchEmbed, DepthwiseConv2d
from .selective_ssm import SelectiveSSM, init_dt_bias_, init_s4d_real_
from .ss2d import CROSS_SCAN, OUT_NORMS, SS2D, CascadeSSM, MultiHeadSSM

__all__ = [
    "CROSS_SCAN",
    "OUT_NORMS",
    "SS2D",
    "CascadeSSM",
    "ChannelsLastConv2d",
    "ConvDownsample",
    "ConvPatchEmbed",
    "DepthwiseConv2d",
    "MultiHeadSSM",
    "OutputNorms",
    "SelectiveSSM",
    "init_dt_bias_",
    "init_s4d_real_",
]
