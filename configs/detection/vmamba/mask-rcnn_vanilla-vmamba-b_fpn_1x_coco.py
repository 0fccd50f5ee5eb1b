"""Mask R-CNN on vanilla VMamba-B, 12 epochs of COCO: published box AP 48.6, mask AP 43.3."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="vanilla_vmamba_base", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
