"""Mask R-CNN on VMamba-T s1l8, 12 epochs of COCO: published box AP 47.3, mask AP 42.7."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
