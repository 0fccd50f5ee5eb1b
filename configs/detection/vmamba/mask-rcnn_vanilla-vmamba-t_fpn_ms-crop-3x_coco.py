"""Mask R-CNN on vanilla VMamba-T, 36 epochs of COCO: published box AP 48.5, mask AP 43.2."""

_base_ = "../_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model_name="vanilla_vmamba_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
