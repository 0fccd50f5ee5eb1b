"""Mask R-CNN on VMamba-S s2l15, 36 epochs of COCO: published box AP 49.9, mask AP 44.2."""

_base_ = "../_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model_name="vmamba_small_s2l15", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
