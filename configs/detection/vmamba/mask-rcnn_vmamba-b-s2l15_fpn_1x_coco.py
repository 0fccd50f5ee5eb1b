"""Mask R-CNN on VMamba-B s2l15, 12 epochs of COCO: published box AP 49.2, mask AP 44.1."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vmamba_base_s2l15", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
