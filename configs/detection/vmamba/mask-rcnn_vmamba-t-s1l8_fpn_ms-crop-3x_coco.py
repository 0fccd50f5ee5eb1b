"""Mask R-CNN on VMamba-T s1l8, 36 epochs of COCO: published box AP 48.8, mask AP 43.7."""

_base_ = "../_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
