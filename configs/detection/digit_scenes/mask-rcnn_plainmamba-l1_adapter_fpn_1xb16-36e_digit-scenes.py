"""Mask R-CNN on PlainMamba-L1 with its adapter, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(type="VisionMambaAdapter", model_name="plainmamba_l1", norm_cfg=dict(type="BN")),
    neck=dict(in_channels=[192] * 4),
)
