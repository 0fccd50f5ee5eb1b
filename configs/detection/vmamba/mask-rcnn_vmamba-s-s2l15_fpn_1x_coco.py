"""Mask R-CNN on VMamba-S s2l15, 12 epochs of COCO: published box AP 48.7, mask AP 43.7."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vmamba_small_s2l15", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
