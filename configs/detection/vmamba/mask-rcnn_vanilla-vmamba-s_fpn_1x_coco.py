"""Mask R-CNN on vanilla VMamba-S, 12 epochs of COCO: published box AP 48.2, mask AP 43.0."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vanilla_vmamba_small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
