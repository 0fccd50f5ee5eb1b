"""Mask R-CNN on EfficientVMamba-T, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_tiny"),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
