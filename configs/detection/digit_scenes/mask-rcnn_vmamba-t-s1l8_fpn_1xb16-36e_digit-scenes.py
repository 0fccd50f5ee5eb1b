"""Mask R-CNN on VMamba-T s1l8, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s1l8"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
