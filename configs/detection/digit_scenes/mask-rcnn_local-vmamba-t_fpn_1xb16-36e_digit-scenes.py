"""Mask R-CNN on LocalVMamba-T, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(model_name="local_vssm_tiny"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
