"""Mask R-CNN on EfficientVMamba-B, 36 epochs of COCO in mixed precision: published box AP 45.0, mask AP 40.8."""

_base_ = "../_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_base", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
