"""Building blocks that the families share."""

from .channel_attention import ChannelAttention
from .checks import check_choice, check_input
from .class_token import (
    CLASS_TOKEN_POSITIONS,
    class_token_indices,
    insert_class_token,
    remove_class_token,
    take_class_token,
)
from .feature_pyramid import SimpleFeaturePyramid
from .gated_mixer import GatedMixer
from .grid_patch_embed import GridPatchEmbed
from .local_scan import LOCAL_DIRECTIONS, LocalScan, chosen_directions, search_weights
from .mlp import Mlp
from .norm import LayerNorm, before_linear
from .output_norms import OutputNorms
from .patch import ChannelsLastConv2d, ConvDownsample, ConvPatchEmbed, DepthwiseConv2d
from .pos_embed import resize_pos_embed_aligned, resize_pos_embed_official
from .residual_stream import STREAM_NORMS, BlockPair, ResidualBlock, StreamLayerNorm, StreamRMSNorm, widen
from .rope import apply_rope, axial_rope_table
from .selective_ssm import SelectiveSSM, init_dt_bias_, init_s4d_real_
from .ss2d import CROSS_SCAN, OUT_NORMS, SS2D, CascadeSSM, MultiHeadSSM
from .strided_patch_embed import StridedPatchEmbed

__all__ = [
    "CLASS_TOKEN_POSITIONS",
    "CROSS_SCAN",
    "LOCAL_DIRECTIONS",
    "OUT_NORMS",
    "SS2D",
    "STREAM_NORMS",
    "BlockPair",
    "CascadeSSM",
    "ChannelAttention",
    "ChannelsLastConv2d",
    "ConvDownsample",
    "ConvPatchEmbed",
    "DepthwiseConv2d",
    "GatedMixer",
    "GridPatchEmbed",
    "LayerNorm",
    "LocalScan",
    "Mlp",
    "MultiHeadSSM",
    "OutputNorms",
    "ResidualBlock",
    "SelectiveSSM",
    "SimpleFeaturePyramid",
    "StreamLayerNorm",
    "StreamRMSNorm",
    "StridedPatchEmbed",
    "apply_rope",
    "axial_rope_table",
    "before_linear",
    "check_choice",
    "check_input",
    "chosen_directions",
    "class_token_indices",
    "init_dt_bias_",
    "init_s4d_real_",
    "insert_class_token",
    "remove_class_token",
    "resize_pos_embed_aligned",
    "resize_pos_embed_official",
    "search_weights",
    "take_class_token",
    "widen",
]
