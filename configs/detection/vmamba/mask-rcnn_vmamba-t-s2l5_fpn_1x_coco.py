"""Mask R-CNN on VMamba-T s2l5, 12 epochs of COCO: published box AP 47.4, mask AP 42.7."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
