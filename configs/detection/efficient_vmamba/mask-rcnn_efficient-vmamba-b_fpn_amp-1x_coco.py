"""Mask R-CNN on EfficientVMamba-B, 12 epochs of COCO in mixed precision: published box AP 43.7, mask AP 40.2."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_base", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
